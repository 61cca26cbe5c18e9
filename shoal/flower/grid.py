"""A Grid of our own: the nodes that an app's server sends to are clients that Shoal plays."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from shoal.flower.compat import name_message
from shoal.flower.ledger import Ledger
from shoal.flower.stage import Stage
from shoal.flower.turns import Answer, Turn
from shoal.protos import seeds
from shoal.protos.errors import RunError

__all__ = ["Node", "Nodes", "ShoalGrid", "node_ids"]


def node_ids(seed: int, nodes: int) -> list[int]:
    """One for each client, the same for the same seed: which node is which client is not left to chance."""
    return [seeds.integer(seed, "flower-node", client=str(client)) for client in range(nodes)]


@dataclass
class Node:
    """One client: what it keeps, how many messages it has had, and those that wait for the one it is at."""

    context: Context
    turns: int = 0
    waiting: deque[_Pending] = field(default_factory=deque)
    busy: bool = False


class Nodes(dict[int, Node]):
    """All of them, by their ids; ``changed`` are those that have begun or ended a turn since it was last emptied."""

    def __init__(self, contexts: Iterable[Context]) -> None:
        super().__init__((context.node_id, Node(context)) for context in contexts)
        self.changed = set[int]()


class _Waiter:
    """Somebody who waits for so many answers."""

    def __init__(self, left: int) -> None:
        self._left, self.over = left, threading.Event()

    def count(self) -> None:
        """One answer has come; one thread at a time may say so."""
        self._left -= 1
        if not self._left:
            self.over.set()


@dataclass(eq=False)
class _Pending:
    """A message on its way, and later its answer."""

    message: Message
    published: Any
    round: int
    client: str
    answer: Answer | None = None
    playing: Future[Answer] | None = None
    waiter: _Waiter | None = None


class ShoalGrid(Grid):
    """Sends to nodes on a :class:`~shoal.flower.stage.Stage`; replies come back in the order of their messages.

    A node plays one message after the other, each with the state that the one before has left.
    """

    def __init__(self, run: Any, nodes: Nodes, stage: Stage, ledger: Ledger, seed: int) -> None:
        self._run, self._stage, self._ledger, self._seed = run, stage, ledger, seed
        self.nodes = nodes
        self._pending, self._lock, self._sent = dict[str, _Pending](), threading.RLock(), 0

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [pending.message.metadata.message_id for pending in self._push(messages)]

    def _push(self, messages: Iterable[Message]) -> list[_Pending]:
        messages, published = list(messages), dict[int, Any]()
        nodes = [self._node(message) for message in messages]
        for message in messages:
            if id(message.content) not in published:
                published[id(message.content)] = self._stage.publish(message.content)
        sent = list[_Pending]()
        with self._lock:
            for message, node, (round, client) in zip(messages, nodes, self._ledger.ask(messages), strict=True):
                self._sent += 1
                name_message(message, f"{self._sent:x}")
                sent.append(_Pending(message, published[id(message.content)], round, client))
                self._pending[sent[-1].message.metadata.message_id] = sent[-1]
                node.waiting.append(sent[-1])
        with self._stage.together():
            for node in nodes:
                self._next(node)
        return sent

    def _node(self, message: Message) -> Node:
        found = self.nodes.get(message.metadata.dst_node_id)
        if found is None:
            raise RunError(
                f"a message goes to node {message.metadata.dst_node_id}, which does not exist; grid.get_node_ids() has "
                f"those that do"
            )
        return found

    def _next(self, node: Node) -> None:
        """Let the node begin with what waits for it, unless it is busy."""
        with self._lock:
            if node.busy or not node.waiting:
                return
            node.busy, pending = True, node.waiting.popleft()
            node.turns += 1
            self.nodes.changed.add(node.context.node_id)
            seed = seeds.integer(self._seed, "flower-client", node.turns, str(node.context.node_id))
            turn = Turn(pending.message.metadata, node.context, seed, pending.round)
        pending.playing = self._stage.submit(turn, pending.published)
        pending.playing.add_done_callback(lambda playing: self._played(node, pending, playing))

    def _played(self, node: Node, pending: _Pending, playing: Future[Answer]) -> None:
        with self._lock:
            node.busy, pending.playing = False, None  # or both would live until somebody collects them
            if not playing.cancelled():
                answer = playing.result()
                if answer.state is not None:
                    node.context.state = answer.state
                    self.nodes.changed.add(node.context.node_id)
                name_message(answer.reply, f"{pending.message.metadata.message_id}r")
                try:  # whoever watches must not keep the strategy from its reply
                    self._ledger.answer(pending.round, pending.client, node.context.node_id, answer)
                finally:
                    pending.answer = answer
                    if pending.waiter is not None:
                        pending.waiter.count()
        self._next(node)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list[Message]()
        with self._lock:
            for name in message_ids:
                pending = self._pending.get(name)
                if pending is not None and pending.answer is not None:
                    replies.append(pending.answer.reply)
                    del self._pending[name]
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies in the order of their messages; who has not answered in time is left out, and ended."""
        sent = self._push(messages)
        self._wait(sent, timeout)
        names = [pending.message.metadata.message_id for pending in sent]
        replies = list(self.pull_messages(names))
        self._abandon([name for name in names if name in self._pending])
        return replies

    def _wait(self, sent: Sequence[_Pending], timeout: float | None) -> None:
        with self._lock:
            playing = [pending for pending in sent if pending.answer is None]
            waiter = _Waiter(len(playing))
            for pending in playing:
                pending.waiter = waiter
        if playing:
            waiter.over.wait(timeout)

    def _abandon(self, names: Sequence[str]) -> None:
        """Nobody can ask for these replies any more."""
        with self._lock:
            late = [self._pending.pop(name) for name in names]
            for pending in late:
                node = self.nodes[pending.message.metadata.dst_node_id]
                if pending in node.waiting:
                    node.waiting.remove(pending)
                self._ledger.miss(pending.round, pending.client, node.context.node_id)
        playing = [pending.playing for pending in late if pending.playing is not None]
        if playing:
            self._stage.abandon(playing)
