"""Processes that have imported what workers need, and fork them: PyTorch is imported once, and for many crews.

A nursery is safe to fork: it has one thread, and runs only imports of Flower, PyTorch and our own modules, no user's
code. There is one for each program, which stays for a while when it has no children. Where libraries do not stand forks
(macOS) there is none, and each worker imports for itself.
"""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import IO, Any, Protocol

from shoal.client.process import command, end_with, environment, fate
from shoal.protos.errors import RunError

__all__ = ["Process", "begin", "do", "main", "not_started", "start", "steps"]

FORKS = sys.platform == "linux"
IDLE = 60.0  # seconds without children after which a nursery ends

# --- in the process that has workers ---------------------------------------------------------------------------------


class Process(Protocol):
    """A worker's process, as the one that has workers sees it; codes are those of :class:`subprocess.Popen`."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def kill(self) -> None: ...


def begin(program: str) -> None:
    """Let a nursery import the module ``program``, whose ``main`` processes are to run. Does not wait."""
    if FORKS:
        _nursery(program)


def do(program: str, what: str) -> None:
    """As `begin`, and let the nursery then import this module, or call this ``module:function``, once."""
    if FORKS and what not in (nursery := _nursery(program)).done:
        nursery.do(what)


def steps(program: str) -> int:
    """How many things the next process finds done."""
    return len(_nursery(program).done) if FORKS else 0


def start(program: str) -> tuple[Process, IO[bytes], IO[bytes]]:
    """A process, as soon as all is done that was asked for, and its standard input and output.

    RunError if it cannot begin.
    """
    orders, to = os.pipe()
    of, answers = os.pipe()
    try:
        process = _started(program, orders, answers)
    except BaseException:
        os.close(to)
        os.close(of)
        raise
    finally:
        os.close(orders)
        os.close(answers)
    return process, os.fdopen(to, "wb"), os.fdopen(of, "rb")


def _started(program: str, orders: int, answers: int) -> Process:
    if not FORKS:
        return _popen(program, orders, answers)
    for _ in range(2):  # the nursery may just have ended
        nursery = _nursery(program)
        with suppress(_Lost):
            return nursery.fork(orders, answers)
    raise not_started(nursery.close())


def not_started(code: int) -> RunError:
    """What is said of a process that ended with this code before it was of use."""
    return RunError(f"a worker could not start ({fate(code)}); see its messages above")


def _popen(program: str, orders: int, answers: int, watched: bool = True) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C is for the process that has workers, which then ends them.
    given: Any = {"stdin": orders, "stdout": answers, "env": environment(), "start_new_session": True}
    return subprocess.Popen(command(program, watched), **given)


class _Lost(Exception):
    """Nobody is there any more."""


class _Nursery:
    """One process; ``done`` is what it has been asked to do so far."""

    def __init__(self, program: str, done: Sequence[str] = ()) -> None:
        self.owner, self.lost, self.done = os.getpid(), False, list[str]()
        self._asking = threading.Lock()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = _popen("shoal.simulations.nursery", theirs.fileno(), 2, watched=False)
        self._channel.send(f"{program} {IDLE}".encode())
        for what in done:
            self.do(what)

    def do(self, what: str) -> None:
        self.done.append(what)
        with suppress(OSError):
            self._channel.send(f"do {what}".encode())

    def fork(self, orders: int, answers: int) -> _Forked:
        about = os.memfd_create("surroundings")
        try:
            with open(about, "wb", closefd=False) as file:
                pickle.dump(_surroundings(), file)
            return _Forked(int(self.ask("fork", orders, answers, 2, about)), self)
        finally:
            os.close(about)

    def ask(self, question: str, *handles: int) -> str:
        with self._asking:
            if self.lost:
                raise _Lost
            answer = b""
            try:
                socket.send_fds(self._channel, [question.encode()], handles)
                answer = self._channel.recv(64)
            except OSError:
                pass
            finally:  # after a Ctrl-C, too: nobody would know whose the next answer is
                self.lost = not answer
            if not answer:
                raise _Lost
        return answer.decode()

    def close(self) -> int:
        """End it, if this process has it; its exit code."""
        self._channel.close()
        if self.owner != os.getpid():
            return 0
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(0.1 if self.lost else 0)  # how it ended by itself, if it did
        self.process.kill()
        return self.process.wait()


_nurseries = dict[str, _Nursery]()
_changing = threading.Lock()


def _nursery(program: str) -> _Nursery:
    with _changing:
        found = _nurseries.get(program)
        if found is None or found.lost or found.owner != os.getpid():
            if found is not None:
                found.close()
            found = _nurseries[program] = _Nursery(program, found.done if found else ())
        return found


@atexit.register
def _close() -> None:
    for nursery in _nurseries.values():
        nursery.close()


class _Forked:
    """A child of the nursery. Its number is its own until the nursery is asked how it ended."""

    def __init__(self, pid: int, nursery: _Nursery) -> None:
        self.pid, self._nursery = pid, nursery
        self._code: int | None = None
        self._asking = threading.Lock()  # who has heard how it ended must not ask again: the number may be another's

    def poll(self) -> int | None:
        with self._asking:
            if self._code is None:
                self._code = self._asked()
            return self._code

    def _asked(self) -> int | None:
        try:
            answer = self._nursery.ask(f"poll {self.pid}")
        except _Lost:  # nobody knows how it ended, but nobody keeps it either
            self.kill()
            return -signal.SIGKILL
        return int(answer) if answer != "alive" else None

    def wait(self) -> int:
        pause = 0.0005
        while (code := self.poll()) is None:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return code

    def kill(self) -> None:
        if self._code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


def _surroundings() -> dict[str, Any]:
    """What a process would have from this one if it were its child; it may have changed since the nursery began."""
    found: dict[str, Any] = {"path": sys.path, "environment": environment(), "cores": os.sched_getaffinity(0)}
    with suppress(OSError):  # somebody has removed it
        found["folder"] = Path.cwd()
    return found


# --- in the nursery, and in its children -----------------------------------------------------------------------------


def main() -> None:
    """Do what is asked until the other side is gone. In a child, be the program."""
    channel = socket.socket(fileno=sys.stdin.fileno())
    name, idle = channel.recv(4096).decode().split()
    program, children = import_module(name), set[int]()
    channel.settimeout(float(idle))
    while True:
        try:
            question, handles, *_ = socket.recv_fds(channel, 4096, 4)
        except TimeoutError:
            if children:
                continue
            return
        match question.decode().split():
            case ["do", what]:
                module, _, function = what.partition(":")
                found = import_module(module)
                if function:
                    getattr(found, function)()
            case ["poll", child]:
                channel.send(_fate(int(child), children).encode())
            case ["fork"]:
                gc.freeze()  # a collection would write to all objects, and so copy them
                nursery, forked = os.getpid(), os.fork()
                if not forked:
                    channel.detach()
                    _settle(nursery, *handles)
                    program.main()
                    return
                for handle in handles:
                    os.close(handle)
                children.add(forked)
                channel.send(str(forked).encode())
            case _:
                return


def _settle(nursery: int, orders: int, answers: int, errors: int, about: int) -> None:
    """Be what a program of its own would be."""
    os.setsid()
    end_with(nursery)
    for place, handle in enumerate((orders, answers, errors)):
        os.dup2(handle, place)
        os.close(handle)
    os.lseek(about, 0, os.SEEK_SET)
    with open(about, "rb") as file:
        surroundings = pickle.load(file)
    sys.path[:] = surroundings["path"]
    invalidate_caches()
    os.environ.clear()
    os.environ.update(surroundings["environment"])
    os.sched_setaffinity(0, surroundings["cores"])
    with suppress(OSError):
        os.chdir(surroundings.get("folder", "."))
    if numpy := sys.modules.get("numpy"):  # draws something else than its siblings, as `random` does of itself
        numpy.random.seed(random.getrandbits(32))


def _fate(child: int, children: set[int]) -> str:
    found, status = os.waitpid(child, os.WNOHANG)
    children.discard(found)
    return str(os.waitstatus_to_exitcode(status)) if found else "alive"
