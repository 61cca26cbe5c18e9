"""What Shoal raises. Catch :class:`ShoalError` to catch everything that is not a bug in Shoal.

::

    ShoalError
    ├── ExperimentError     the experiment cannot be run as it is written
    ├── DataError           a data set, a shard or a label is not what it must be
    ├── InvalidUpdate       what a client returned must not be counted
    ├── RoundError          a round could not be completed (quorum)
    ├── CodecError          bytes that are no message of this protocol
    ├── ConnectionRefused   the other side cannot be reached, or says no
    │   └── NotAllowed      a server asks for code that the client's owner did not allow
    └── RunError            a run folder or a checkpoint is missing or damaged

Every message is one sentence that says what is wrong, where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CodecError",
    "ConnectionRefused",
    "DataError",
    "ExperimentError",
    "InvalidUpdate",
    "NotAllowed",
    "RoundError",
    "RunError",
    "ShoalError",
    "nearest",
]


class ShoalError(Exception):
    """The root of the tree."""


class ExperimentError(ShoalError):
    """The experiment cannot be run as it is written: an unknown key, a wrong type, an invalid combination."""


class DataError(ShoalError):
    """A data set, a shard or a label is not what it must be."""


class InvalidUpdate(ShoalError):
    """A client's update is malformed, not finite or impossible; it is not counted."""


class RoundError(ShoalError):
    """Too few clients answered a round for it to count."""


class CodecError(ShoalError):
    """Bytes that are no message of this protocol."""


class ConnectionRefused(ShoalError):
    """The other side cannot be reached or refuses to talk; trying again without a change will not help."""


class NotAllowed(ConnectionRefused):
    """A server asks for code that the client's owner did not allow."""


class RunError(ShoalError):
    """A run folder or a checkpoint is missing or damaged."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'rounds'?)"``, or the list of known words where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(known)})" if known else ""
