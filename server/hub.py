"""Who is connected, what each client is asked, and what has come back: the service's state.

Everything here runs on the event loop of :mod:`shoal.server.serving` and touches neither gRPC nor torch. What happens
is told as events to whoever asked.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence

from shoal.protos import fleet_pb2 as wire
from shoal.protos.codec import content_of, decode_failure
from shoal.protos.errors import CodecError, InvalidUpdate
from shoal.protos.messages import NOTHING
from shoal.protos.transport import CAPABILITIES, software
from shoal.server.admission import Admit, check_name, common_version, examine, failure_of, without_an_app
from shoal.server.orders import (
    Answered,
    Asked,
    Assigned,
    Blob,
    Call,
    Denied,
    Failed,
    Joined,
    Left,
    News,
    Order,
    Over,
    Refused,
    Repeated,
    Session,
)
from shoal.server.spool import Incoming, Torn

__all__ = ["Hub"]

MISSED = 3  # heartbeats, after which a connection is taken for dead
MOST = 2**17  # clients that are known: beyond, names that cost nothing go
QUEUED = 64  # replies to one client: a client that does not read gets no more heartbeats


class Hub:
    """``tell`` gets all news and must not block. ``admit`` may deny a client whose name and version are right.

    ``owners`` has the identities to which names belong that an earlier process let in.
    """

    def __init__(
        self,
        tell: Callable[[News], None],
        heartbeat: float = 30.0,
        admit: Admit = without_an_app,
        owners: Mapping[str, str] = NOTHING,
    ) -> None:
        self.tell, self.heartbeat, self._admit, self._owners = tell, heartbeat, admit, owners
        self.known: dict[str, str] = {}  # the clients that ever joined, with the identities they proved
        self._sessions: dict[str, Session] = {}  # by token
        self._present: dict[str, Session] = {}  # by client
        self._seen: dict[str, float] = {}
        self._open: dict[str, Assigned] = {}  # by nonce
        self._blobs: dict[bytes, Blob] = {}

    # --- connections -------------------------------------------------------------------------------------------------

    @property
    def present(self) -> Collection[str]:
        return self._present.keys()

    @property
    def sessions(self) -> Collection[Session]:
        """The connections of those that are present."""
        return self._present.values()

    def join(self, hello: wire.Hello, identity: str, peer: str) -> Session:
        """Accept a client; Denied if it speaks another protocol or bears another's name."""
        version = common_version(hello)
        check_name(hello.client)
        self._admit(hello, self.present)
        owner = self.known.get(hello.client, self._owners.get(hello.client, identity))
        if owner != identity:
            self.tell(Refused(hello.client, peer, identity))
            raise Denied(
                "PERMISSION_DENIED",
                f"client {hello.client!r} belongs to the certificate of {owner!r}, not of {identity!r}; give another "
                f"name with --id",
            )
        self.known[hello.client] = identity
        before = self._present.get(hello.client)
        now = time.monotonic()
        session = Session(secrets.token_hex(16), hello.client, hello.instance, peer, now, now)
        if before is not None:
            self._drop(before)
            if before.instance != hello.instance:
                self.tell(Left(session.client, f"another process has joined under its name, from {peer}"))
                before.close(f"another process has joined as {hello.client!r} from {peer}", wire.Goodbye.REPLACED)
            else:
                before.close(f"{hello.client!r} has a newer connection", wire.Goodbye.COME_BACK)
        self._sessions[session.token] = self._present[session.client] = session
        self._seen[session.client] = session.seen
        self._forget_names()
        welcome = wire.Welcome(version=version, software=software(), session=session.token, heartbeat=self.heartbeat)
        welcome.capabilities[:] = [name for name in hello.capabilities if name in CAPABILITIES]
        session.send(wire.ConnectReply(welcome=welcome))
        for assigned in self._open.values():
            if assigned.client == session.client and assigned.committing is None:
                session.send(assigned.offer())
        if before is None or before.instance != hello.instance:
            self.tell(Joined(session.client, peer, identity))
        return session

    def _forget_names(self) -> None:
        """Without TLS anybody may come under any number of names: the oldest goes that is gone and has no task."""
        if len(self.known) > MOST:
            here = {*self._present, *(assigned.client for assigned in self._open.values())}
            gone = next((name for name, identity in self.known.items() if not identity and name not in here), None)
            if gone is not None:
                del self.known[gone], self._seen[gone]

    def leave(self, session: Session, reason: str) -> None:
        """The connection is gone; the client's task stays open until its lease ends."""
        if self._drop(session):
            self.tell(Left(session.client, reason))

    def _drop(self, session: Session) -> bool:
        self._sessions.pop(session.token, None)
        if self._present.get(session.client) is not session:
            return False
        del self._present[session.client]
        return True

    def beat(self, session: Session, nonce: str) -> None:
        """A sign of life; it renews the lease of the task that the client is at, and of no other."""
        session.seen = time.monotonic()
        assigned = self._open.get(nonce)
        if assigned is not None:
            assigned.begun |= assigned.client == session.client
            self._sign(session)
        if session.outgoing.qsize() < QUEUED:
            session.send(wire.ConnectReply(heartbeat=wire.Heartbeat()))

    def _sign(self, session: Session) -> None:
        session.seen = self._seen[session.client] = time.monotonic()

    def session(self, token: str) -> Session:
        """Denied if there is no such connection (any more)."""
        if token not in self._sessions:
            raise Denied("UNAUTHENTICATED", "this connection is over; call Connect again and use its session")
        return self._sessions[token]

    def tick(self) -> None:
        """Once in a while: find out who is gone, and whose task has ended without an answer."""
        now = time.monotonic()
        for session in list(self._present.values()):
            if now - session.seen > MISSED * self.heartbeat:
                session.close("no heartbeat", wire.Goodbye.COME_BACK)
                self.leave(session, f"no heartbeat for {now - session.seen:.0f} s")
        for assigned in list(self._open.values()):
            if assigned.committing is not None:
                continue
            silent = now - self.sign_of(assigned)
            if assigned.order.ends is not None and now >= assigned.order.ends:
                self._fail(assigned, f"client {assigned.client!r} did not answer before the deadline", "late")
            elif silent > assigned.order.lease:
                self._fail(assigned, f"client {assigned.client!r} was lost: no sign of it for {silent:.0f} s", "lost")

    def close(self, reason: str, advice: wire.Goodbye.Advice.ValueType) -> None:
        """Say goodbye to everybody."""
        for session in list(self._sessions.values()):
            session.close(reason, advice)

    # --- tasks -------------------------------------------------------------------------------------------------------

    def task(self, nonce: str) -> Assigned | None:
        """Where a task stands; None if it is over."""
        return self._open.get(nonce)

    def sign_of(self, assigned: Assigned) -> float:
        """When there was last a sign that renews the task's lease."""
        return max(assigned.since, self._seen.get(assigned.client, 0.0))

    def ask(self, order: Order, calls: Sequence[Call]) -> None:
        """Offer the order's task to those who have not answered it."""
        self._blobs |= {blob.sha256: blob for blob in (order.assignment, order.payload)}
        for call in calls:
            assigned = Assigned(call.nonce, call.client, call.counted, order, time.monotonic())
            self._open[call.nonce] = assigned
            if call.taken:
                assigned.committing = asyncio.get_running_loop().create_future()
                assigned.committing.set_result(wire.Receipt(status=wire.Receipt.ACCEPTED))
            elif call.client in self._present:
                self._present[call.client].send(assigned.offer())
        self.tell(Asked(order, calls))

    def end(self, order: Order, reason: str) -> None:
        """Withdraw what is still open, and forget the order's content unless another order has the same."""
        for assigned in [a for a in self._open.values() if a.order is order]:
            if assigned.committing is None:
                self._withdraw(assigned, reason)
            self._forget(assigned)
        if all(a.order.payload.sha256 != order.payload.sha256 for a in self._open.values()):
            self._blobs.pop(order.payload.sha256, None)
        self.tell(Over(order))

    def _fail(self, assigned: Assigned, reason: str, kind: str) -> None:
        self._withdraw(assigned, reason)
        self._forget(assigned)
        self.tell(Failed(assigned.nonce, failure_of(assigned, reason, kind=kind)))

    def _withdraw(self, assigned: Assigned, reason: str) -> None:
        session = self._present.get(assigned.client)
        if session is not None:
            session.send(wire.ConnectReply(withdrawal=wire.Withdrawal(nonce=assigned.nonce, reason=reason)))

    def _forget(self, assigned: Assigned) -> None:
        self._open.pop(assigned.nonce, None)
        if assigned.incoming is not None and assigned.committing is None:
            assigned.incoming.discard()

    def blob(self, session: Session, sha256: bytes) -> Blob:
        """What a client wants to fetch; Denied if it is not, or not any more, on offer."""
        self._sign(session)
        session.fetched = sha256
        if sha256 not in self._blobs:
            raise Denied("NOT_FOUND", "these bytes are not on offer any more: their round is over; wait for a new task")
        return self._blobs[sha256]

    # --- answers -----------------------------------------------------------------------------------------------------

    def begin(self, session: Session, nonce: str, header: bytes) -> int:
        """From which byte to go on. What the header claims is checked before anything is kept for it."""
        assigned = self._assigned(session, nonce)
        if assigned.incoming is not None and (assigned.committing is not None or assigned.incoming.header == header):
            return assigned.incoming.offset
        try:
            content, sha256, total = content_of(header)
            if assigned.committing is not None:
                return total  # taken before this server was: the client shall ask for its receipt
            if content == "failure":
                decode_failure(header)
            else:
                assigned.order.check(assigned.client, content, header, None)
        except (CodecError, InvalidUpdate) as error:
            self._fail(assigned, str(error), "rejected")
            raise Denied("INVALID_ARGUMENT", str(error)) from error
        before, assigned.incoming = assigned.incoming, None
        if before is not None:
            before.discard()
        assigned.incoming = Incoming(assigned.order.journal.payload(nonce), header, sha256, total)
        return assigned.incoming.offset

    def incoming(self, session: Session, nonce: str) -> Incoming:
        """Where the next chunk goes."""
        found = self._assigned(session, nonce)
        if found.incoming is None or found.committing is not None:
            raise Denied("FAILED_PRECONDITION", f"task {nonce!r} expects no bytes now; call Begin first")
        return found.incoming

    async def commit(self, session: Session, nonce: str) -> wire.Receipt:
        """The receipt: the same answer counts once, however often it is committed."""
        assigned = self._assigned(session, nonce)
        if assigned.committing is not None:
            receipt = await asyncio.shield(assigned.committing)
            if receipt.status != wire.Receipt.ACCEPTED:
                return receipt
            self.tell(Repeated(nonce))
            return wire.Receipt(status=wire.Receipt.DUPLICATE)
        incoming = self.incoming(session, nonce)
        if incoming.offset < incoming.total:
            raise Denied("FAILED_PRECONDITION", f"{incoming.offset} of {incoming.total} bytes are here; send the rest")
        # A task of its own: a caller that hangs up must not leave the answer half taken.
        assigned.committing = asyncio.create_task(self._take(assigned, incoming))
        return await asyncio.shield(assigned.committing)

    async def _take(self, assigned: Assigned, incoming: Incoming) -> wire.Receipt:
        receipt, began = wire.Receipt(status=wire.Receipt.ACCEPTED), time.monotonic()
        try:
            failure = await asyncio.to_thread(examine, assigned, incoming)
            if failure is None and assigned.nonce in self._open:
                identity = self.known[assigned.client]
                await asyncio.to_thread(assigned.order.journal.take, assigned.nonce, incoming.header, identity)
        except Torn as error:
            assigned.committing = assigned.incoming = None
            incoming.discard()
            raise Denied("ABORTED", str(error)) from error
        except (CodecError, InvalidUpdate) as error:
            failure = failure_of(assigned, str(error), kind="rejected")
            receipt = wire.Receipt(status=wire.Receipt.REJECTED, reason=str(error))
        except OSError:
            if assigned.nonce in self._open:  # the disk: the client may commit again
                assigned.committing = None
                raise
        except Exception as error:  # a defect of ours must not keep the round waiting for this answer
            reason = f"the server cannot examine the answer of client {assigned.client!r}: {error!r}"
            failure = failure_of(assigned, reason, traceback.format_exc(), "rejected")
            receipt = wire.Receipt(status=wire.Receipt.REJECTED, reason=reason)
        if assigned.nonce not in self._open:  # the order has ended meanwhile
            incoming.discard()
            raise Denied("NOT_FOUND", _over(assigned.nonce))
        if failure is None:
            self.tell(Answered(assigned.nonce, assigned.client, incoming.header, time.monotonic() - began))
        else:
            incoming.discard()
            self.tell(Failed(assigned.nonce, failure))
        return receipt

    def _assigned(self, session: Session, nonce: str) -> Assigned:
        self._sign(session)
        assigned = self._open.get(nonce)
        if assigned is None or assigned.client != session.client:
            raise Denied("NOT_FOUND", _over(nonce))
        return assigned


def _over(nonce: str) -> str:
    return f"task {nonce!r} needs no answer any more: its round is over, or it was given up; wait for a new task"
