"""Processes that are forked from one that has imported what they need, and what becomes of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Thread, main_thread

import pytest

from shoal.protos.errors import RunError
from shoal.simulations import nursery

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems' libraries do not stand forks")

PROGRAM = """
import os, random, sys
import numpy

def note():
    sys.modules["noted"] = sys

def main():
    for line in sys.stdin:
        match line.split():
            case ["exit", code]:
                sys.exit(int(code))
            case ["who"]:
                said = f"{os.getpid()} {os.getppid()} {os.getsid(0)}"
            case ["drawn"]:
                said = f"{random.random()} {numpy.random.random()}"
            case ["handles"]:
                paths = [f"/proc/self/fd/{number}" for number in range(3, 64)]
                said = " ".join(os.readlink(path) for path in paths if os.path.lexists(path))
            case ["noted"]:
                said = str("noted" in sys.modules)
            case ["where"]:
                print("an error", file=sys.stderr)
                said = f"{os.getcwd()} {sys.path[0]} {os.environ['PLACE']} {len(os.sched_getaffinity(0))}"
        print(said, flush=True)
"""


class Talk:
    """A process, and the pipes to it."""

    def __init__(self, program: str) -> None:
        self.process, self._to, self._of = nursery.start(program)

    def ask(self, what: str) -> str:
        self.say(what)
        return self._of.readline().decode().strip()

    def say(self, what: str) -> None:
        self._to.write(f"{what}\n".encode())
        self._to.flush()

    @property
    def parent(self) -> int:
        return int(self.ask("who").split()[1])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._to.close()
        self._of.close()


Begin = Callable[[], Talk]


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Begin]:
    """Processes of a nursery that no other test has."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    with ExitStack() as stack:
        yield lambda: stack.enter_context(closing(Talk("program")))
    if left := nursery._nurseries.pop("program", None):
        left.close()


def test_a_process_has_a_session_of_its_own_and_siblings_one_parent(begin: Begin) -> None:
    first = begin()
    process, parent, session = first.ask("who").split()

    assert session == process == str(first.process.pid)
    assert begin().parent == int(parent) != os.getpid()


def test_processes_that_begin_at_the_same_time_have_one_parent(tmp_path: Path, begin: Begin) -> None:
    """While the nursery is busy."""
    (tmp_path / "slow.py").write_text(f"def wait():\n    open({str(tmp_path / 'begun')!r}).close()\n")
    os.mkfifo(tmp_path / "begun")
    parent = begin().parent
    nursery.do("program", "slow:wait")
    with ThreadPoolExecutor(3) as threads:
        talks = [threads.submit(begin) for _ in range(3)]
        while not nursery._nurseries["program"]._asking.locked():
            pass
        nursery.begin("program")
        (tmp_path / "begun").open("w").close()

    assert {talk.result().parent for talk in talks} == {parent}


def test_siblings_draw_different_numbers(begin: Begin) -> None:
    first, second = begin().ask("drawn").split(), begin().ask("drawn").split()

    assert not set(first) & set(second)


def test_a_process_has_no_handle_of_its_siblings_or_the_nursery(begin: Begin) -> None:
    begin()
    handles = begin().ask("handles").split()

    assert not [handle for handle in handles if handle.startswith(("pipe", "socket", "/memfd"))]


def test_what_has_changed_since_the_nursery_began_holds_for_its_next_process(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """``capfd`` has another standard error than the process before had."""
    begin()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.syspath_prepend("/a/new/place")
    monkeypatch.setenv("PLACE", "here")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        talk = begin()
    finally:
        os.sched_setaffinity(0, before)

    assert talk.ask("where") == f"{tmp_path / 'elsewhere'} /a/new/place here 1"
    assert capfd.readouterr().err == "an error\n"


def test_a_folder_that_is_gone(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    assert begin().ask("who")


def test_it_is_said_how_a_process_ended(begin: Begin) -> None:
    leaves, killed, stays = begin(), begin(), begin()
    leaves.say("exit 137")
    os.kill(killed.process.pid, signal.SIGTERM)

    assert leaves.process.wait() == 137 == leaves.process.poll()
    assert killed.process.wait() == -signal.SIGTERM
    assert stays.process.poll() is None
    assert not Path(f"/proc/{leaves.process.pid}").exists()  # and is no zombie
    leaves.process.kill()  # is of no consequence


def test_what_was_asked_for_is_there_in_the_next_process(begin: Begin) -> None:
    before = begin()
    nursery.do("program", "program:note")
    nursery.do("program", "program:note")

    assert begin().ask("noted") == "True" and before.ask("noted") == "False"
    assert nursery.steps("program") == 1


def test_a_nursery_that_is_lost_is_replaced_and_its_children_end(begin: Begin) -> None:
    before = begin()
    nursery.do("program", "program:note")
    lost = before.parent
    os.kill(lost, signal.SIGKILL)
    after = begin()

    assert after.parent not in (lost, os.getpid()) and after.ask("noted") == "True"
    assert before.process.wait() == -signal.SIGKILL


def test_ctrl_c_while_a_process_is_waited_for(tmp_path: Path, begin: Begin) -> None:
    """Nobody knows then what the next answer is about, so there is another nursery."""
    (tmp_path / "slow.py").write_text(
        f"def wait():\n    open({str(tmp_path / 'begun')!r}).close()\n    while True: pass"
    )
    os.mkfifo(tmp_path / "begun")
    first = begin().parent
    nursery.do("program", "slow:wait")

    def interrupt() -> None:
        (tmp_path / "begun").open("w").close()
        while not nursery._nurseries["program"]._asking.locked():  # until the answer is waited for
            pass
        signal.pthread_kill(main_thread().ident or 0, signal.SIGINT)

    thread = Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        begin()
    thread.join()
    nursery._nurseries["program"].done.clear()

    assert begin().parent not in (first, os.getpid())


def test_a_nursery_without_children_ends_after_a_while(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "IDLE", 0.01)
    with closing(Talk("program")) as talk:
        first = talk.parent
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # it has a child: nothing happens
        assert talk.parent == first
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)

    assert begin().parent != first


def test_those_who_wait_for_one_child_at_the_same_time_hear_the_same(begin: Begin) -> None:
    """It can be asked once only how a child ended."""
    first = begin()
    for _ in range(20):
        talk, heard = begin(), list[int]()
        together = threading.Barrier(4)

        def wait(talk: Talk = talk, heard: list[int] = heard, together: threading.Barrier = together) -> None:
            together.wait()
            heard.append(talk.process.wait())

        threads = [threading.Thread(target=wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        talk.say("exit 3")
        for thread in threads:
            thread.join()

        assert heard == [3] * 4
    assert begin().parent == first.parent  # the same nursery


def test_where_nothing_can_be_forked(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "FORKS", False)
    nursery.begin("program")
    nursery.do("program", "program:note")
    talk = begin()

    assert talk.parent == os.getpid() and talk.ask("noted") == "False" and nursery.steps("program") == 0
    talk.say("exit 3")
    assert talk.process.wait() == 3 == talk.process.poll()


def test_a_program_that_cannot_be_imported(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match=r"a worker could not start \(exit code 1\); see its messages above"):
        Talk("no_program")
    assert "No module named 'no_program'" in capfd.readouterr().err


def test_all_end_when_the_process_that_has_them_is_killed(tmp_path: Path) -> None:
    """Also one that does not read its pipe."""
    (tmp_path / "sleeper.py").write_text("import time\n\ndef main():\n    print(flush=True)\n    time.sleep(600)\n")
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(tmp_path)!r})
        from shoal.simulations import nursery
        process, _, answers = nursery.start("sleeper")
        answers.read(1)
        print(nursery._nurseries["sleeper"].process.pid, process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert len(done.stdout.split()) == 2
    while any(map(_runs, done.stdout.split())):  # they have closed its standard error, so they are about to
        pass


def _runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
