"""Processes of our own beside this one: plain Python programs with one thread each.

Not forks of this one (threads and locks do not survive a fork), and not through ``multiprocessing`` (which would import
the user's script again). Workers of a simulation are forks of such a program: :mod:`shoal.simulations.nursery`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = [
    "answer_jobs",
    "answers_on",
    "collecting_less",
    "command",
    "cores",
    "end_with",
    "environment",
    "fate",
    "jobs_on",
    "keep_memory",
]

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# glibc gives large blocks back to the system and faults them in again at every step; other systems ignore these names.
MMAP_THRESHOLD, TRIM_THRESHOLD = 2**28, 2**30  # bytes: that a block must have to be given back, and that are kept
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD), "MALLOC_TRIM_THRESHOLD_": str(TRIM_THRESHOLD)}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command(module: str, watched: bool = True) -> list[str]:
    """How to start ``module``'s ``main``: with the caller's import paths, never the folder it starts in.

    It ends with the caller, from before the first heavy import on; not ``watched``, it must see to that itself.
    """
    watch = f"from shoal.client.process import end_with; end_with({os.getpid()}); " if watched else ""
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {watch}from {module} import main; main()"]


def environment() -> dict[str, str]:
    """The environment of a process that computes on one core."""
    return os.environ | ONE_THREAD | KEEP_MEMORY


def keep_memory() -> None:
    """Let this process keep the memory that it frees, as those do that it starts."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # other C libraries have none
        libc.mallopt(-3, MMAP_THRESHOLD)  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(-1, TRIM_THRESHOLD)


@contextmanager
def collecting_less() -> Iterator[None]:
    """For a while, what there is now is not looked through each time that garbage is collected, but what is made."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def answers_on() -> IO[bytes]:
    """In the process: the pipe to its parent. What a user's code prints must not get between messages."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def jobs_on() -> IO[bytes]:
    """In the process: the pipe from its parent. What a user's code asks at a terminal must not wait for an answer."""
    jobs = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    with Path(os.devnull).open("rb") as nobody:
        os.dup2(nobody.fileno(), sys.stdin.fileno())
    return jobs


def answer_jobs(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In the process: answer jobs, a line of JSON each, until the other side is gone."""
    jobs, answers = jobs_on(), answers_on()
    for line in jobs:
        answers.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        answers.flush()


def end_with(parent: int) -> None:
    """In the process: leave when the parent is gone, even if a user's code never returns to read the pipe."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def fate(code: int) -> str:
    """How a process ended, in words."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
