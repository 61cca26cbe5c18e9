"""Every fault that there is: one card each, which a trial shuffles."""

from __future__ import annotations

from tests.chaos import disk, faults, network
from tests.chaos.faults import Fault
from tests.chaos.points import POINTS, Side

__all__ = ["DECK"]

UPLOAD = ("announced", "sending", "uploaded")  # a client dies amid its answer
RESENT = ("taken", "accepted", "receipt", "received")  # the receipt is lost: the client sends its answer again


def _at_points() -> list[Fault]:
    found = []
    for point in POINTS:
        if point.side is Side.SERVER:
            rows = (3, 6) if point.name in RESENT else (3,)
            found.append(Fault(f"server killed: {point.means}", "server", faults.server_at(point.name), rows))
        else:
            stateful = point.name == "stated"
            name = f"client killed: {point.means}"
            rows = (6,) if point.name in RESENT else (1,) if point.name in UPLOAD else (2,)
            found.append(Fault(name, "client", faults.client_at(point.name), rows, stateful=stateful))
    return found


DECK = (
    *_at_points(),
    Fault("server killed at a drawn time", "server", faults.server_sometime, (3,)),
    Fault("server killed again while it recovers", "server", faults.server_twice, (3,)),
    Fault("server killed while a client is away", "server", faults.client_then_server, (4,)),
    Fault("everybody killed at once", "all", faults.everybody, (4,)),
    Fault("server stopped and started again", "server", faults.server_stopped, (26,)),
    Fault("server frozen for 0.5 to 8 s", "server", faults.frozen(server=True), (5,)),
    Fault("client killed at a drawn time", "client", faults.client_sometime, (2,)),
    Fault("client stopped and started again", "client", faults.client_stopped, (26,)),
    Fault("client frozen for 0.5 to 8 s", "client", faults.frozen(server=False), (5,)),
    *(
        Fault(f"only its worker killed: {point.means}", "worker", faults.worker_at(point.name), (23,), lenient=True)
        for point in POINTS
        if point.side is Side.WORKER and point.name != "stated"
    ),
    Fault("server's disk full for 0.2 to 3 s", "disk", disk.full, (14,)),
    Fault("server killed, newest checkpoint damaged", "disk", disk.checkpoint_damaged, (21,)),
    Fault("server killed, an answer on its disk damaged", "disk", disk.payload_damaged, (21,)),
    Fault("server killed, journal's tail torn", "disk", disk.journal_torn, (4, 21)),
    Fault("all connections reset", "network", network.cut_all, (5,)),
    Fault("one connection reset", "network", network.cut_one, (5,)),
    Fault("nobody can connect for 0.5 to 6 s", "network", network.refused, (5,)),
    Fault("no byte moves for 0.5 to 8 s", "network", network.stalled, (5,)),
    Fault("half-open connections", "network", network.half_open, (5,), long=True),
    Fault("connections torn amid a frame", "network", network.torn, (1, 5)),
    Fault("a bit flips (TLS)", "network", network.flipped, (20,), tls=True),
    Fault("slow readers, 3 to 30 kB/s", "network", network.slow, (5,)),
    Fault("nobody can connect for 20 to 60 s", "network", network.refused_long, (5,), long=True),
    Fault("a NAT forgets all connections amid an upload", "network", network.forgotten, (1, 5), long=True),
    Fault("30 % of pieces lost, as TCP shows it", "network", network.losing, (5,)),
    Fault("50 to 300 ms of delay, with jitter", "network", network.late, (5,)),
)
