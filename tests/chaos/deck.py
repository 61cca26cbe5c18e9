"""Every fault that there is: one card each, which a trial shuffles."""

from __future__ import annotations

from tests.chaos import disk, faults, network
from tests.chaos.faults import Fault
from tests.chaos.points import POINTS, Side

__all__ = ["DECK"]


def _at_points() -> list[Fault]:
    found = []
    for point in POINTS:
        if point.side is Side.SERVER:
            found.append(Fault(f"server killed: {point.means}", "server", faults.server_at(point.name)))
        else:
            stateful = point.name == "stated"
            name = f"client killed: {point.means}"
            found.append(Fault(name, "client", faults.client_at(point.name), stateful=stateful))
    return found


DECK = (
    *_at_points(),
    Fault("server killed at a drawn time", "server", faults.server_sometime),
    Fault("server killed again while it recovers", "server", faults.server_twice),
    Fault("server killed while a client is away", "server", faults.client_then_server),
    Fault("everybody killed at once", "all", faults.everybody),
    Fault("server stopped and started again", "server", faults.server_stopped),
    Fault("server frozen for 0.5 to 8 s", "server", faults.frozen(server=True)),
    Fault("client killed at a drawn time", "client", faults.client_sometime),
    Fault("client stopped and started again", "client", faults.client_stopped),
    Fault("client frozen for 0.5 to 8 s", "client", faults.frozen(server=False)),
    *(
        Fault(f"only its worker killed: {point.means}", "worker", faults.worker_at(point.name), lenient=True)
        for point in POINTS
        if point.side is Side.WORKER and point.name != "stated"
    ),
    Fault("server's disk full for 0.2 to 3 s", "disk", disk.full),
    Fault("server killed, newest checkpoint damaged", "disk", disk.checkpoint_damaged),
    Fault("server killed, an answer on its disk damaged", "disk", disk.payload_damaged),
    Fault("server killed, journal's tail torn", "disk", disk.journal_torn),
    Fault("all connections reset", "network", network.cut_all),
    Fault("one connection reset", "network", network.cut_one),
    Fault("nobody can connect for 0.5 to 6 s", "network", network.refused),
    Fault("no byte moves for 0.5 to 8 s", "network", network.stalled),
    Fault("half-open connections", "network", network.half_open, long=True),
    Fault("connections torn amid a frame", "network", network.torn),
    Fault("a bit flips (TLS)", "network", network.flipped, tls=True),
    Fault("slow readers, 3 to 30 kB/s", "network", network.slow),
    Fault("50 to 300 ms of delay, with jitter", "network", network.late),
)
