"""A full or failing disk is no end: what cannot be written now is written when it can be."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Patience", "at_once"]

T = TypeVar("T")
PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS})
PAUSE = 1.0  # seconds between two attempts


def at_once(write: Callable[[], T]) -> T:
    """No patience: a disk that is full is an error."""
    return write()


class Patience:
    """Called with what writes, it tries until the disk takes it. ``tell`` hears when it begins and ends to wait.

    ``record`` gets it for the log when it is over (before, the log could not be written): why the disk refused, and for
    how many seconds. ``refused`` hears at once why the disk takes no more, and None when it does again.
    """

    def __init__(
        self,
        tell: Callable[[str], None],
        record: Callable[[str, float], None] = lambda why, seconds: None,
        refused: Callable[[str | None], None] = lambda reason: None,
    ) -> None:
        self._tell, self._record, self._refused = tell, record, refused

    def __call__(self, write: Callable[[], T]) -> T:
        waited: float | None = None
        why = ""
        while True:
            try:
                done = write()
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                if waited is None:
                    waited, why = time.monotonic(), str(error)
                    self._refused(error.strerror or str(error))
                    self._tell(f"the disk takes no more ({error}); nothing is lost, the run goes on when it does")
                time.sleep(PAUSE)
            else:
                if waited is not None:
                    self._refused(None)
                    self._tell("the disk takes what is written again")
                    self._record(why, time.monotonic() - waited)
                return done
