"""What crosses the wire, message by message: counted in a real run, and written down in docs/protocol.md.

``python benchmarks/wire.py`` prints the count, ``python benchmarks/wire.py --write`` brings the page up to date; a test
compares the two. Requests and replies are counted as serialised by protobuf, at the server, without gRPC's and HTTP/2's
own framing (about 14 bytes a message).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from shoal.compose import Composition
from shoal.experiment import Experiment
from shoal.protos import fleet_pb2 as wire
from shoal.protos.transport import Address
from shoal.server.hub import Hub
from shoal.server.journal import Journal
from shoal.server.remote import RemoteFleet, Terms
from shoal.server.service import handlers
from shoal.server.serving import Serving

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "protocol.md"
BEGIN, END = "<!-- written by benchmarks/wire.py -->\n", "<!-- end of what is written -->"
ROUNDS, CLIENTS = 2, 5
CLIENT = "import sys; sys.argv[0] = 'shoal'; from shoal.cli import main; main()"
ORDER = (
    *("hello", "welcome", "offer of training", "offer of evaluation", "withdrawal", "heartbeat", "goodbye"),
    *("DownloadRequest", "Chunk", "BeginRequest with update", "BeginRequest with measurement", "BeginReply"),
    *("UploadRequest", "UploadReply", "CommitRequest", "Receipt"),
)


class Recorder(grpc.GenericRpcHandler):
    """The service, with every message on its way in and out written down."""

    def __init__(self, inner: grpc.GenericRpcHandler) -> None:
        self._inner = inner
        self.sizes: dict[str, list[tuple[int, int]]] = defaultdict(list)

    def note(self, kind: Any, data: bytes) -> None:
        name, tensors = describe(kind.FromString(data))
        self.sizes[name].append((len(data), tensors))

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        handler: Any = self._inner.service(details)
        if handler is None:
            return None
        method = wire.DESCRIPTOR.services_by_name["Fleet"].methods_by_name[str(details.method).rpartition("/")[2]]
        asked, given = (getattr(wire, kind.name) for kind in (method.input_type, method.output_type))
        shape = f"{_form(handler.request_streaming)}_{_form(handler.response_streaming)}"
        behaviour = getattr(handler, shape)

        async def recorded(request: Any, context: Any) -> Any:
            if handler.request_streaming:
                request = self._each(asked, request)
            else:
                self.note(asked, request)
            reply = await behaviour(request, _Heard(context, lambda data: self.note(given, data)))
            if reply is not None:
                self.note(given, reply)
            return reply

        return getattr(grpc, f"{shape}_rpc_method_handler")(recorded)

    async def _each(self, kind: Any, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for request in requests:
            self.note(kind, request)
            yield request


class _Heard:
    """A call's context that tells what is written."""

    def __init__(self, context: Any, tell: Callable[[bytes], None]) -> None:
        self._context, self._tell = context, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def write(self, data: bytes) -> None:
        self._tell(data)
        await self._context.write(data)


def _form(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def describe(message: Any) -> tuple[str, int]:
    """A message's name on the page, and how many bytes of tensors it carries."""
    if isinstance(message, wire.ConnectRequest | wire.ConnectReply):
        content = str(message.WhichOneof("content"))
        if content != "offer":
            return content, 0
        kind = wire.Header.FromString(message.offer.header).task.kind  # type: ignore[union-attr]
        return f"offer of {'training' if kind == 'train' else 'evaluation'}", 0
    if isinstance(message, wire.BeginRequest):
        return f"BeginRequest with {wire.Header.FromString(message.header).WhichOneof('content')}", 0
    if isinstance(message, wire.UploadRequest):
        return "UploadRequest", len(message.chunk.data)
    return message.DESCRIPTOR.name, len(message.data) if isinstance(message, wire.Chunk) else 0


def measure() -> Recorder:
    """Two rounds of examples/five.toml with five clients that another process hosts."""
    experiment = Experiment.from_file(ROOT / "examples" / "five.toml", [f"rounds={ROUNDS}", f"cohort={CLIENTS}"])
    composition = Composition(replace(experiment, checkpoint_every=0))
    with tempfile.TemporaryDirectory() as folder:
        return _run(composition, Path(folder))


def _run(composition: Composition, folder: Path) -> Recorder:
    experiment, data, recorders = composition.experiment, composition.data, list[Recorder]()
    assert data is not None

    def service(hub: Hub) -> Recorder:
        recorders.append(Recorder(handlers(hub)))
        return recorders[0]

    with closing(Serving(Address("127.0.0.1", 0), None, service=service)) as serving:
        words = ["client", "--connect", str(serving.address), "--insecure", "--once", "--state", str(folder / "state")]
        words += ["--data", str(ROOT / "examples" / "five.toml"), "--simulate", str(CLIENTS), "--workers", "1"]
        with subprocess.Popen([sys.executable, "-c", CLIENT, *words], stdout=subprocess.DEVNULL) as clients:
            terms = Terms("a-run", experiment.assignment(data).encode(), experiment.strategy, composition.initial)
            fleet = RemoteFleet(serving, terms, Journal(folder), data.clients)
            fleet.wait_for(CLIENTS, lambda present: None, lambda: clients.poll() is not None)
            composition.coordinator(fleet, composition.start(), []).run()
            serving.close(finished=True)
    return recorders[0]


def table(recorder: Recorder) -> str:
    """The count as it stands on the page."""
    lines = ["| message | carries | in the run | most bytes | of them tensors |", "|---|---|---|---|---|"]
    for name in ORDER:
        sizes = recorder.sizes.get(name)  # none in a run where nothing goes wrong
        numbers = f"{len(sizes)} | {max(sizes)[0]:,} | {max(sizes)[1]:,}" if sizes else "– | – | –"
        lines.append(f"| {name} | {carries(name)} | {numbers} |")
    return "\n".join(lines)


def carries(name: str) -> str:
    """The fields of a message, those of what it wraps included."""
    first, _, content = name.partition(" with ")
    fields = _fields(first.partition(" of ")[0])
    if content:
        return f"{fields}: {_fields('header')}; {_fields(content)}"
    if first.startswith("offer"):
        return f"{fields}: {_fields('header')}; {_fields('task')}"
    return f"{fields}: {_fields('chunk')}" if first == "UploadRequest" else fields


def _fields(name: str) -> str:
    """Of a message, or of the one that a field of this name holds."""
    kind = getattr(wire, name, None) or getattr(wire, name.capitalize())
    return ", ".join(field.name for field in kind.DESCRIPTOR.fields if field.containing_oneof is None) or "nothing"


def fill(page: str, content: str) -> str:
    """The page with the table between its two marks replaced."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{content}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    counted = table(measure())
    print(counted)
    if "--write" in sys.argv:
        PAGE.write_text(fill(PAGE.read_text(), counted))


if __name__ == "__main__":
    main()
