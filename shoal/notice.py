"""A server's status in words: a notice with a table of clients, and lines of what has changed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shoal.protos import fleet_pb2 as wire

__all__ = ["Ticker", "notice"]

ROWS = 20  # clients that a notice names
STATES = (  # in the order of a task's life
    *("asked", "training", "uploading", "checking", "answered"),
    *("rejected", "failed", "late", "lost", "withdrawn"),
)
CALM = ("answered", "withdrawn")


def notice(reply: wire.StatusReply, address: str) -> RenderableType:
    """Everything that a person wants to see at once."""
    parts: list[RenderableType] = [_line(text) for text in _heading(reply, address)]
    if reply.tasks or reply.connections:
        parts += ["", _clients(reply)]
        more = len({t.client for t in reply.tasks} | {c.client for c in reply.connections}) - ROWS
        parts += [_line(f"and {more} more; --json has them")] if more > 0 else []
    if reply.troubles:
        parts += ["", _line("last failures")]
        parts += [_line(f"  {duration(t.ago)} ago, {_trouble(t)}") for t in reply.troubles]
    return Group(*parts)


def _heading(reply: wire.StatusReply, address: str) -> list[str]:
    ending = "; it is about to stop" if reply.draining else ""
    disk = f"takes no more since {duration(reply.disk_for)} ({reply.disk})" if reply.disk else "takes what is written"
    return [
        f"server   {reply.software} at {address}, up for {duration(reply.uptime)}{ending}",
        *_run(reply),
        f"clients  {reply.connected} connected",
        f"bytes    {size(reply.bytes_up)} up, {size(reply.bytes_down)} down",
        f"disk     {disk}",
    ]


def _run(reply: wire.StatusReply) -> list[str]:
    run = reply.run
    if not reply.HasField("run"):
        return ["run      none yet"]
    phase = f"{_phase(run)} for {duration(run.phase_for)}"
    begun = f", begun {duration(run.round_for)} ago" if run.round_for else ""
    ends = f", deadline in {duration(run.deadline_in)}" if run.HasField("deadline_in") else ""
    lines = [f"run      {run.folder}", f"round    {_at(run)}, {phase}{begun}{ends}"]
    if run.states:
        lines.append(f"asked    {reply.asked}: {_states(run)}")
    if run.metrics:
        numbers = [f"{name} {run.metrics[name]:.4f}" for name in sorted(run.metrics)]
        lines.append(f"metrics  {'  '.join(numbers)}")
    return lines


def _at(run: wire.RunStatus) -> str:
    return f"{run.round} of {run.rounds}" if run.rounds else str(run.round)


def _phase(run: wire.RunStatus) -> str:
    return f"waiting for {run.wanted} clients" if run.phase == "waiting" else run.phase


def _states(run: wire.RunStatus) -> str:
    known = sorted(run.states, key=lambda state: STATES.index(state) if state in STATES else len(STATES))
    return ", ".join(f"{run.states[state]} {state}" for state in known)


def _clients(reply: wire.StatusReply) -> Table:
    """Those that were asked, and those that are only connected; if there are many, those that matter first."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="")
    for name in ("client", "state", "for", "last sign", "lease left", "answer", "connected", "from"):
        table.add_column(name, no_wrap=name != "client")
    connections = {connection.client: connection for connection in reply.connections}
    tasks = list(reply.tasks)
    if len(tasks) > ROWS:
        tasks.sort(key=lambda task: (not task.overdue, task.state in CALM))
    rows = [_task_row(task, connections.pop(task.client, None)) for task in tasks]
    rows += [[c.client, "not asked", "", duration(c.silent_for), "", "", *_there(c)] for c in connections.values()]
    for row in rows[:ROWS]:
        table.add_row(*map(Text, row))
    return table


def _task_row(task: wire.TaskStatus, connection: wire.Connection | None) -> list[str]:
    open_ = bool(task.lease_left or task.silent_for)
    here = f"{size(task.bytes_here)} of {size(task.bytes_total)}" if task.bytes_total else ""
    return [
        task.client,
        f"{task.state}, overdue" if task.overdue else task.state,
        duration(task.asked_for) if open_ else "",
        duration(task.silent_for) if open_ else "",
        duration(task.lease_left) if open_ else "",
        here,
        *(_there(connection) if connection is not None else ("yes" if task.connected else "no", "")),
    ]


def _there(connection: wire.Connection) -> tuple[str, str]:
    return duration(connection.connected_for), connection.peer


def _trouble(trouble: wire.Trouble) -> str:
    who = "" if repr(trouble.client) in trouble.reason else f"client {trouble.client!r}: "
    return f"round {trouble.round}: {trouble.state}: {who}{trouble.reason}"


def _line(text: str) -> Text:
    return Text(text, overflow="fold")


class Ticker:
    """What has changed since the last look, in lines."""

    def __init__(self) -> None:
        self._said, self._troubles = "", set[tuple[str, str, int, str]]()

    def lines(self, reply: wire.StatusReply) -> Sequence[str]:
        """A line about the round and its clients if there is another one to say, and one for each new failure."""
        run, said = reply.run, [f"{reply.connected} connected"]
        if reply.HasField("run"):
            where = f"round {_at(run)}, {_phase(run)}"
            said = [where, *([f"{reply.asked} asked: {_states(run)}"] if run.states else []), *said]
        said += [f"the disk takes no more ({reply.disk})"] if reply.disk else []
        said += ["about to stop"] if reply.draining else []
        return [*self._new(reply.troubles), *self._other("; ".join(said))]

    def lost(self, reason: str) -> Sequence[str]:
        """The server cannot be asked."""
        return self._other(reason)

    def _other(self, text: str) -> list[str]:
        before, self._said = self._said, text
        return [text] if text != before else []

    def _new(self, troubles: Sequence[wire.Trouble]) -> list[str]:
        named = {(t.run, t.client, t.round, t.reason): t for t in reversed(troubles)}
        fresh = [trouble for name, trouble in named.items() if name not in self._troubles]
        self._troubles = set(named)
        return [_trouble(trouble) for trouble in fresh]


def duration(seconds: float) -> str:
    """Such as ``12 s``, ``3 min 5 s``, ``2 h 4 min`` or ``3 d 4 h``."""
    whole = round(seconds)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{whole} s"


def size(count: float) -> str:
    """Such as ``3.2 MB``."""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count:.0f} B"
