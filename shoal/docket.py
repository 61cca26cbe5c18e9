"""What a server command has begun, so that the same command goes on with it after whatever ended it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from shoal.protos.errors import RunError
from shoal.protos.files import locked, write_whole
from shoal.server.runs import RunFolder

__all__ = ["Docket"]


class Docket:
    """The run folders of one command, in the order of its experiments.

    ``OUT/.serving-<hash>`` names them, a line each. The hash is of the experiments and the address. It is held by the
    one process that serves, and begins anew when all its runs are finished, or with ``anew``. RunError if another
    process holds it.
    """

    def __init__(self, out: Path, experiments: Sequence[str], listen: str, anew: bool = False) -> None:
        self._out = out
        name = hashlib.sha256("\0".join([listen, *experiments]).encode()).hexdigest()[:16]
        self._path, self._announced = out / f".serving-{name}", out / f".serving-{name}.making"
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = locked(out / f".serving-{name}.lock")
            self._names = self._path.read_text(encoding="utf-8").split("\n")[:-1] if self._path.exists() else []
        except OSError as error:
            raise RunError(f"{str(out)!r} cannot hold runs ({error.strerror}); give another folder") from error
        if lock is None:
            raise RunError(f"another server runs these experiments at {listen}, in {out}; stop it, or let it go on")
        self._lock = lock
        done = len(self._names) == len(experiments) and all(map(self._finished, range(len(experiments))))
        if anew or done:
            self._names = []
        self._sweep()

    def folder(self, number: int, name: str) -> RunFolder:
        """The folder of the experiment of this number: the one that it had, or a new one."""
        if number < len(self._names) and (self._out / self._names[number]).is_dir():
            return RunFolder(self._out / self._names[number])
        folder = RunFolder.create(self._out, name, self._announce)
        self._names[number:] = [folder.path.name]
        write_whole(self._path, ["".join(f"{name}\n" for name in self._names).encode()])
        self._announced.unlink()
        return folder

    @property
    def begun(self) -> Sequence[Path]:
        """The run folders there are."""
        return [self._out / name for name in self._names]

    def _announce(self, path: Path) -> None:
        write_whole(self._announced, [path.name.encode()])

    def _sweep(self) -> None:
        """Remove the folder that an earlier process made and had no time to write down: it is empty."""
        if self._announced.exists():
            with contextlib.suppress(OSError):  # it was not made, or is another process's, which has begun to fill it
                (self._out / self._announced.read_text(encoding="utf-8")).rmdir()
            self._announced.unlink()

    def _finished(self, number: int) -> bool:
        folder = RunFolder(self._out / self._names[number])
        return folder.has("summary.json") and folder.read("summary.json")["status"] == "finished"

    def close(self) -> None:
        self._lock.close()
