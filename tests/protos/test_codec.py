"""What is encoded comes back bit for bit, and nothing but CodecError answers to anything else."""

from __future__ import annotations

import hashlib
import math
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.protos import codec, manifest
from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError
from shoal.protos.messages import Envelope, Failure, Kind, Measurement, Spec, Task, Update
from shoal.protos.parameters import Entry, Layout, Parameters, Segment, frozen_hash

Array = np.ndarray
NUMPY = [dtype.name for dtype in manifest.DTYPES.values()]
DECODERS: list[Callable[[bytes, bytes], object]] = [
    codec.decode_task,
    codec.decode_update,
    codec.decode_envelope,
    codec.decode_failure,
]
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
int64s = st.integers(-(2**63), 2**63 - 1)
leaves = (
    st.booleans()
    | int64s
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    | st.binary(max_size=4)
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
numbers = st.floats(allow_nan=False, allow_infinity=False) | int64s


@st.composite
def arrays(draw: st.DrawFn, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> Array:
    """Any bits at all: denormals, both zeros, every NaN."""
    kind = np.dtype(dtype or draw(st.sampled_from(NUMPY)))
    form = draw(shapes) if shape is None else shape
    count = math.prod(form) * kind.itemsize
    bits = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), np.uint8)
    return (bits % 2 if kind == np.bool_ else bits).view(kind).reshape(form)


@st.composite
def models(draw: st.DrawFn) -> Parameters[Array]:
    dtype = draw(st.sampled_from(["float32", "float64"]))
    of = {Segment.TRAINABLE: dtype, Segment.BUFFERS: dtype, Segment.COUNTERS: "int64"}
    entries = []
    for name in draw(st.lists(names, unique=True, max_size=4)):
        segment = draw(st.sampled_from(Segment))
        entries.append(Entry(name, segment, of.get(segment) or draw(st.sampled_from(NUMPY[:5])), draw(shapes)))
    layout = Layout(tuple(entries))
    of[Segment.TRAINABLE] = of[Segment.BUFFERS] = layout.dtype
    trainable, buffers, counters = (draw(arrays(kind, (layout.size(s),))) for s, kind in of.items())
    local, frozen = ({e.name: draw(arrays(e.dtype, e.shape)) for e in layout.of(s)} for s in [*Segment][3:])
    return Parameters(layout, trainable, buffers, counters, local, frozen)


tasks: st.SearchStrategy[Task[Array]] = st.builds(
    Task,
    st.sampled_from(Kind),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    models(),
    st.dictionaries(names, arrays(), max_size=3),
    st.dictionaries(names, values, max_size=3),
    st.none() | st.dictionaries(names, st.builds(Spec, st.sampled_from(NUMPY), shapes), max_size=2),
)
updates: st.SearchStrategy[Update[Array]] = st.builds(
    Update,
    arrays(),
    numbers,
    numbers,
    numbers,
    st.dictionaries(names, arrays(), max_size=3),
    st.none() | arrays(),
    st.none() | arrays(),
    st.dictionaries(names, numbers, max_size=3),
)


def pack(value: codec.Value) -> tuple[bytes, bytes]:
    header, buffers = codec.encode(value)
    return header, b"".join(buffers)


def bits(value: Any) -> Any:
    """A form in which only equal bits and equal types are equal."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return {name: bits(each) for name, each in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return [bits(getattr(value, name)) for name in value.__dataclass_fields__]
    return repr(value)


def a_task(**changes: Any) -> Task[Array]:
    layout = Layout(
        (
            Entry("net.weight", Segment.TRAINABLE, "float32", (2, 3)),
            Entry("norm.mean", Segment.BUFFERS, "float32", (2,)),
            Entry("norm.count", Segment.COUNTERS, "int64", ()),
            Entry("head", Segment.LOCAL, "float32", (2,)),
            Entry("base", Segment.FROZEN, "bfloat16", (2,)),
        )
    )
    model = Parameters(
        layout,
        np.arange(6, dtype="float32"),
        np.ones(2, "float32"),
        np.array([7], "int64"),
        {"head": np.full(2, 5, "float32")},
        {"base": np.full(2, 9, "uint16")},
    )
    fields: dict[str, Any] = {"kind": Kind.TRAIN, "round": 3, "version": 2, "model": model}
    return Task(**(fields | {"tensors": {"c": np.ones(3, "int8")}, "settings": {"mu": 0.1}} | changes))


def an_update(**changes: Any) -> Update[Array]:
    fields: dict[str, Any] = {"delta": np.arange(4, dtype="float32"), "examples": 10, "metrics": {"loss": 0.5}}
    return Update(**(fields | {"tensors": {"c": np.ones(3, "int8")}} | changes))


@quick
@given(tasks)
def test_a_task_comes_back(task: Task[Array]) -> None:
    expected = replace(task, model=replace(task.model, local={}, frozen={}))
    decoded, frozen = codec.decode_task(*pack(task))

    assert bits(expected) == bits(decoded)
    assert frozen_hash(task.model.frozen) == frozen


@quick
@given(updates)
def test_an_update_comes_back(update: Update[Array]) -> None:
    assert bits(update) == bits(codec.decode_update(*pack(update)))


@quick
@given(st.builds(Failure, names, st.integers(0, 2**64 - 1), names, names))
def test_a_failure_comes_back(failure: Failure) -> None:
    header, payload = pack(failure)

    assert failure == codec.decode_failure(header)
    assert payload == b""


@quick
@given(st.builds(Measurement, st.dictionaries(names, numbers, max_size=3)))
def test_a_measurement_comes_back(measurement: Measurement) -> None:
    header, payload = pack(measurement)

    assert bits(measurement) == bits(codec.decode_measurement(header))
    assert payload == b""


contents = st.binary(max_size=9).map(lambda data: np.frombuffer(data, np.uint8))


@quick
@given(st.builds(Envelope, st.integers(0, 2**64 - 1), contents, st.dictionaries(names, values, max_size=3)))
def test_an_envelope_comes_back(envelope: Envelope) -> None:
    header, payload = pack(envelope)

    assert bits(envelope) == bits(codec.decode_envelope(header, payload))
    assert payload == envelope.content.tobytes()


def test_an_envelope_is_readdressed_without_its_content() -> None:
    content = np.frombuffer(b"what it says", np.uint8)
    header, payload = pack(Envelope(1, content, {"to": "a", "by": b"x"}))
    again = codec.readdressed(header, 2, {"to": "b"})

    assert bits(codec.decode_envelope(again, payload)) == bits(Envelope(2, content, {"to": "b"}))
    assert codec.content_of(again) == codec.content_of(header)
    with pytest.raises(CodecError, match="bytes in the header, at most 99"):
        codec.readdressed(header, 2, {"to": "b" * 99}, limits=manifest.Limits(header=99))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.manifest.tensors[0].ClearField("role"), "a vector has no name"),
        (
            lambda header: header.manifest.tensors[0].MergeFrom(wire.Tensor(dtype="int8")),
            "is int8.4.; it must be bytes",
        ),
        (lambda header: header.manifest.tensors[0].shape.insert(0, 1), "is uint8.1, 4.; it must be bytes"),
        (lambda header: header.envelope.settings.add(name="to"), "setting 'to' stands there twice"),
        (lambda header: header.envelope.settings[0].ClearField("value"), "setting 'to' has no value"),
        (lambda header: header.manifest.tensors.add(name="w", role="tensor", dtype="int8", offset=4, shape=[0]), "'w'"),
    ],
)
def test_the_receiver_refuses_an_envelope(change: Callable[[wire.Header], object], message: str) -> None:
    header, payload = pack(Envelope(1, np.zeros(4, np.uint8), {"to": "a"}))
    hostile = wire.Header.FromString(header)
    change(hostile)

    with pytest.raises(CodecError, match=message):
        codec.decode_envelope(hostile.SerializeToString(), payload)


@quick
@given(updates)
def test_a_header_says_what_comes_before_it_is_there(update: Update[Array]) -> None:
    header, payload = pack(update)
    announced = codec.decode_update(header, None)

    assert codec.content_of(header) == ("update", hashlib.sha256(payload).digest(), len(payload))
    assert (announced.delta.shape, announced.delta.dtype) == (update.delta.shape, update.delta.dtype)
    assert announced.tensors.keys() == update.tensors.keys()
    assert announced.metrics == update.metrics


@pytest.mark.fault(10)
def test_what_is_announced_takes_no_memory() -> None:
    header, _ = pack(an_update(delta=np.zeros(4, "float32")))
    message = wire.Header.FromString(header)
    (delta,) = (tensor for tensor in message.manifest.tensors if tensor.role == "delta")
    delta.shape[:], delta.nbytes = [2**29], 2**31
    message.manifest.tensors[1].offset = 2**31
    message.manifest.total_bytes = 2**31 + message.manifest.tensors[1].nbytes
    announced = codec.decode_update(message.SerializeToString(), None)

    assert announced.delta.shape == (2**29,)
    assert announced.delta.strides == (0,)


def test_a_hash_of_another_length_is_refused() -> None:
    message = wire.Header.FromString(pack(an_update())[0])
    message.manifest.sha256 = b"short"

    with pytest.raises(CodecError, match="has 5 bytes"):
        codec.content_of(message.SerializeToString())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_every_kind_of_float_keeps_its_bits(dtype: str) -> None:
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    tiny = np.finfo(dtype).smallest_subnormal
    delta = np.array([-0.0, 0.0, tiny, -tiny, np.inf, -np.inf, np.nan], dtype)
    delta.view(unsigned)[-1] += 5  # a NaN with a message in it

    decoded = codec.decode_update(*pack(an_update(delta=delta)))

    assert delta.view(unsigned).tolist() == decoded.delta.view(unsigned).tolist()


def test_settings_keep_their_types() -> None:
    sent = {"a": True, "b": 1, "c": 1.0, "d": "1", "e": b"1", "f": [], "g": [False, 0, -0.0, "", b"", [[math.inf]]]}

    decoded, _ = codec.decode_task(*pack(a_task(settings=sent)))

    assert repr(sent) == repr(decoded.settings)


def test_absent_is_not_empty() -> None:
    assert codec.decode_task(*pack(a_task(reply=None)))[0].reply is None
    assert codec.decode_task(*pack(a_task(reply={})))[0].reply == {}
    assert codec.decode_update(*pack(an_update())).buffers is None
    assert codec.decode_update(*pack(an_update(buffers=np.empty(0)))).buffers is not None


def test_a_strategy_may_name_its_tensor_like_a_vector() -> None:
    tensors = {name: np.full(2, i) for i, name in enumerate(["delta", "tensor", "a/b", "größe 🐟"])}

    assert bits(tensors) == bits(codec.decode_update(*pack(an_update(tensors=tensors))).tensors)


def test_local_and_frozen_values_stay_at_home() -> None:
    task = a_task()
    _, payload = pack(task)
    decoded, frozen = codec.decode_task(*pack(task))

    assert len(payload) == 6 * 4 + 2 * 4 + 8 + 3
    assert task.model.layout == decoded.model.layout
    assert {} == decoded.model.local == decoded.model.frozen
    assert frozen_hash(task.model.frozen) == frozen


def test_contiguous_tensors_are_not_copied() -> None:
    delta = np.zeros(4, "float32")
    _, buffers = codec.encode(an_update(delta=delta, tensors={}))
    delta[0] = 1

    assert [delta.tobytes()] == [bytes(b) for b in buffers]
    assert buffers[0].readonly


def test_any_memory_order_is_sent_in_row_major_order() -> None:
    square = np.arange(6.0).reshape(2, 3)
    sent = {"columns": np.asfortranarray(square), "slice": square[:, ::2], "swapped": square.astype(">f8")}

    decoded = codec.decode_update(*pack(an_update(tensors=sent))).tensors

    assert {name: value.tolist() for name, value in sent.items()} == {n: v.tolist() for n, v in decoded.items()}
    assert all(value.dtype == np.float64 for value in decoded.values())


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_decoded_tensors_are_aligned_read_only_views(kind: Callable[[bytes], bytes]) -> None:
    header, payload = pack(an_update(delta=np.arange(3.0), buffers=np.ones(3, "int8"), counters=np.ones(1, "int64")))
    payload = kind(payload)
    update = codec.decode_update(header, payload)

    for array in (update.delta, update.buffers, update.counters):
        assert array is not None
        assert not array.flags.writeable
        assert array.flags.aligned
        assert np.shares_memory(array, np.frombuffer(payload, np.uint8))


def test_the_same_value_has_the_same_bytes() -> None:
    assert pack(a_task()) == pack(a_task())


def test_the_hash_is_only_skipped_on_request() -> None:
    header, payload = pack(an_update(tensors={}))
    payload = bytes([payload[0] ^ 1]) + payload[1:]

    with pytest.raises(CodecError, match="SHA-256"):
        codec.decode_update(header, payload)
    assert codec.decode_update(header, payload, verify=False).delta.shape == (4,)


def cyclic() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def a_model(layout: Layout, vector: Array) -> Parameters[Array]:
    return Parameters(layout, vector, vector, vector)


REFUSED_TO_SEND: list[tuple[Task[Array] | Update[Array] | Failure, str]] = [
    (a_task(settings={"x": None}), "setting 'x' holds a NoneType"),
    (a_task(settings={"x": [(1, 2)]}), "setting 'x' holds a tuple"),
    (a_task(settings={"x": np.int64(1)}), "setting 'x' holds a int64"),
    (a_task(settings={"x": 2**63}), "setting 'x' is an integer of 64 bits"),
    (a_task(settings={"x": cyclic()}), "nested lists in setting 'x'"),
    (a_task(settings={"": 1}), "a setting has no name"),
    (a_task(settings={"x" * 513: 1}), "characters in the name of setting"),
    (a_task(settings={"x": "\ud800"}), "the task has no wire form"),
    (a_task(settings={"x": b"0" * 2**20}), "bytes in the header"),
    (a_task(round=-1), "the task has no wire form"),
    (a_task(kind="explode"), "the task's kind is 'explode'"),
    (a_task(reply={"c": Spec("bfloat16", ())}), "reply tensor 'c' is of numpy dtype 'bfloat16'"),
    (a_task(reply={"c": Spec("float32", (-1,))}), "the task has no wire form"),
    (a_task(tensors={"c": np.ones(1, "complex64")}), "tensor 'c' is of numpy dtype 'complex64'"),
    (a_task(tensors={"c": np.array([None])}), "tensor 'c' is of numpy dtype 'object'"),
    (a_task(tensors={"c": [1.0]}), "tensor 'c' is a list"),
    (a_task(model=a_model(a_task().model.layout, np.ones(6, "float32"))), "frozen"),
    (a_task(model=a_model(Layout(()), np.ones(1, "float32"))), r"trainable are float32\[1\].*float32\[0\]"),
    (a_task(model=a_model(Layout(()), np.ones(0, "float32"))), "counters are float32"),
    (an_update(metrics={"loss": math.nan}), "metric 'loss' is nan"),
    (an_update(metrics={"loss": -math.inf}), "metric 'loss' is -inf"),
    (an_update(metrics={"loss": True}), "metric 'loss' is of type bool"),
    (an_update(examples=np.ones((3, 1))), "examples is of type ndarray"),
    (an_update(steps=10**400), "steps is an integer of 1329 bits"),
    (Failure("c", -1, "", ""), "the failure has no wire form"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED_TO_SEND, ids=[message for _, message in REFUSED_TO_SEND])
def test_the_sender_refuses(value: Task[Array] | Update[Array] | Failure, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        codec.encode(value)


def mix_dtypes(header: wire.Header) -> None:
    header.task.layout[1].dtype = "float64"
    entries = [Entry(e.name, Segment(e.segment), e.dtype, tuple(e.shape)) for e in header.task.layout]
    header.task.layout_hash = Layout(tuple(entries)).hash


def reorder(header: wire.Header) -> None:
    first, second = header.manifest.tensors[0], header.manifest.tensors[-1]
    first.offset, second.offset = second.offset, first.offset


def huge(header: wire.Header) -> None:
    tensor = header.manifest.tensors[0]
    tensor.shape[:] = [2**40]
    tensor.nbytes = header.manifest.total_bytes = 2**40 * manifest.DTYPES[tensor.dtype].itemsize


def odd(header: wire.Header) -> None:
    """The smallest tensor first: contiguous, but the next one is not aligned."""
    small = header.manifest.tensors.pop()
    small.offset = 0
    tensors = [small, *header.manifest.tensors]
    for tensor in tensors[1:]:
        tensor.offset += small.nbytes
    header.manifest.ClearField("tensors")
    header.manifest.tensors.extend(tensors)


def nest(header: wire.Header) -> None:
    setting = header.task.settings[0].value
    for _ in range(17):
        setting = setting.list.values.add()
    setting.integer = 1


MUTATIONS: list[tuple[Callable[[wire.Header], object], str]] = [
    (lambda h: setattr(h.manifest, "byte_order", "big"), "byte order is 'big'"),
    (lambda h: h.ClearField("manifest"), "byte order is ''"),
    (lambda h: setattr(h.manifest, "total_bytes", 44), "has 43 bytes, its manifest says 44"),
    (lambda h: setattr(h.manifest, "sha256", b"x"), "SHA-256"),
    (lambda h: setattr(h.manifest.tensors[3], "name", ""), "a tensor has no name"),
    (lambda h: h.manifest.tensors.append(h.manifest.tensors[3]), "tensor 'c' stands there twice"),
    (lambda h: h.manifest.tensors.append(h.manifest.tensors[0]), "vector 'counters' stands there twice"),
    (lambda h: h.manifest.tensors.add(role="w", name="w", dtype="int8", shape=[0], offset=43), "'w'"),
    (lambda h: setattr(h.manifest.tensors[3], "role", "delta"), "tensor 'c' has the role 'delta'"),
    (lambda h: setattr(h.manifest.tensors[0], "role", "tensor"), "it needs trainable"),
    (lambda h: setattr(h.manifest.tensors[3], "dtype", "os.system"), "tensor 'c' is of dtype 'os.system'"),
    (lambda h: setattr(h.manifest.tensors[3], "nbytes", 4), "tensor 'c' claims 4 bytes"),
    (lambda h: h.manifest.tensors[3].shape.append(2), "tensor 'c' claims 3 bytes, but its shape needs 6"),
    (lambda h: h.manifest.tensors[3].shape.extend([2**63, 2**63]), "tensor 'c' has the impossible shape"),
    (lambda h: h.manifest.tensors[3].shape.extend([0, 2**63]), "impossible shape"),
    (lambda h: h.manifest.tensors[3].shape.extend([1] * 32), "impossible shape"),
    (reorder, "begins at byte 40, expected 0"),
    (lambda h: setattr(h.manifest.tensors[3], "offset", 41), "tensor 'c' begins at byte 41, expected 40"),
    (lambda h: setattr(h.manifest.tensors[3], "offset", 39), "tensor 'c' begins at byte 39, expected 40"),
    (odd, "tensor 'counters' is not aligned at byte 3"),
    (huge, "begins at byte 8, expected 8796093022208"),
    (lambda h: h.task.layout.append(h.task.layout[0]), "layout tensor 'net.weight' stands there twice"),
    (lambda h: setattr(h.task.layout[0], "segment", "x"), "the segment of layout tensor 'net.weight' is 'x'"),
    (lambda h: setattr(h.task.layout[3], "dtype", "S8"), "layout tensor 'head' is of dtype 'S8'"),
    (lambda h: h.task.layout[3].shape.append(2**60), "layout tensor 'head' has the impossible shape"),
    (lambda h: setattr(h.task.layout[3], "name", "neck"), "layout's hash"),
    (mix_dtypes, "convert the model to one dtype"),
    (lambda h: setattr(h.task, "frozen_hash", ""), "1 frozen tensors"),
    (lambda h: setattr(h.task, "kind", ""), "kind is ''; this version knows train"),
    (lambda h: h.task.settings.append(h.task.settings[0]), "setting 'mu' stands there twice"),
    (lambda h: h.task.settings[0].ClearField("value"), "setting 'mu' has no value"),
    (nest, "nested lists in setting 'mu'"),
    (lambda h: [h.task.reply.tensors.add(name="r", dtype="bool") for _ in "12"], "reply tensor 'r' stands there twice"),
    (lambda h: [h.task.reply.tensors.add() for _ in range(2**14 + 1)], "16385 tensors in the reply, at most 16384"),
    (lambda h: h.task.reply.tensors.add(name="r", dtype="x"), "reply tensor 'r' is of dtype 'x'"),
    (lambda h: h.task.reply.tensors.add(name="r", dtype="bool", shape=[2**60]), "reply tensor 'r' has"),
]


@pytest.mark.parametrize(("mutate", "message"), MUTATIONS, ids=[message for _, message in MUTATIONS])
@pytest.mark.fault(9)
def test_the_receiver_refuses(mutate: Callable[[wire.Header], object], message: str) -> None:
    header, payload = pack(a_task())
    hostile = wire.Header.FromString(header)
    mutate(hostile)

    with pytest.raises(CodecError, match=message):
        codec.decode_task(hostile.SerializeToString(), payload)


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (lambda h: h.update.ClearField("examples"), "examples is missing"),
        (lambda h: setattr(h.update.metrics[0].value, "real", math.nan), "metric 'loss' is nan"),
        (lambda h: h.update.metrics.append(h.update.metrics[0]), "metric 'loss' stands there twice"),
        (lambda h: h.ClearField("update"), "expected a header with update, got None"),
    ],
)
@pytest.mark.fault(9)
def test_the_receiver_refuses_an_update(mutate: Callable[[wire.Header], object], message: str) -> None:
    header, payload = pack(an_update())
    hostile = wire.Header.FromString(header)
    mutate(hostile)

    with pytest.raises(CodecError, match=message):
        codec.decode_update(hostile.SerializeToString(), payload)


def test_a_failure_has_no_tensors() -> None:
    header, payload = pack(an_update(tensors={}))

    with pytest.raises(CodecError, match="the failure brings tensor 'delta'"):
        codec.decode_failure(header + wire.Header(failure=wire.Failure()).SerializeToString(), payload)


def test_one_content_is_not_taken_for_another() -> None:
    with pytest.raises(CodecError, match="expected a header with update, got task"):
        codec.decode_update(*pack(a_task()))


def test_a_bool_is_zero_or_one() -> None:
    header, payload = pack(an_update(delta=np.array([True, False]), tensors={}))

    with pytest.raises(CodecError, match="tensor 'delta' of bool has a byte 2"):
        codec.decode_update(header, b"\2\0", verify=False)
    assert payload == b"\1\0"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (manifest.Limits(header=50), "bytes in the header, at most 50"),
        (manifest.Limits(payload=42), "43 bytes in the payload, at most 42"),
        (manifest.Limits(tensors=3), "4 tensors in the payload, at most 3"),
        (manifest.Limits(tensors=4), "5 tensors in the layout, at most 4"),
        (manifest.Limits(name=9), "10 characters in the name of layout tensor 'net.weight', at most 9"),
    ],
)
@pytest.mark.fault(10)
def test_limits_hold_on_both_sides(limits: manifest.Limits, message: str) -> None:
    header, payload = pack(a_task())

    with pytest.raises(CodecError, match=message):
        codec.decode_task(header, payload, limits=limits)
    with pytest.raises(CodecError, match=message):
        codec.encode(a_task(), limits=limits)


def test_an_error_does_not_repeat_a_long_text() -> None:
    hostile = wire.Header.FromString(pack(a_task())[0])
    hostile.task.kind = "k" * 10_000

    with pytest.raises(CodecError) as caught:
        codec.decode_task(hostile.SerializeToString(), pack(a_task())[1])
    assert len(str(caught.value)) < 200


@pytest.mark.fault(10)
def test_a_claimed_tensor_takes_no_memory() -> None:
    hostile = wire.Header.FromString(pack(an_update(tensors={}))[0])
    huge(hostile)
    header = hostile.SerializeToString()
    limits = manifest.Limits(payload=2**60)
    tracemalloc.start()

    with pytest.raises(CodecError, match="its manifest says 4398046511104"):
        codec.decode_update(header, b"\0" * 16, limits=limits)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def survives(header: bytes, payload: bytes) -> None:
    for decode in DECODERS:
        try:
            decode(header, payload)
        except CodecError as error:
            assert str(error)


@quick
@given(st.binary(max_size=200), st.binary(max_size=20))
@pytest.mark.fault(19)
def test_random_bytes(header: bytes, payload: bytes) -> None:
    survives(header, payload)


@pytest.mark.parametrize(
    "value",
    [
        a_task(reply={"c": Spec("int8", (3,))}),
        an_update(),
        Envelope(3, np.zeros(4, np.uint8), {"to": "a"}),
        Failure("c", 1, "r", "t"),
    ],
)
@pytest.mark.fault(19)
def test_every_flipped_bit_and_every_cut_of_the_header(value: codec.Value) -> None:
    header, payload = pack(value)
    for at in range(len(header)):
        flipped = bytearray(header)
        flipped[at] ^= 1 << at % 8

        survives(bytes(flipped), payload)
        survives(header[:at], payload)


@quick
@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=2, max_size=5))
@pytest.mark.fault(19)
def test_several_wrong_bytes_in_the_header(changes: list[tuple[int, int]]) -> None:
    header, payload = pack(a_task())
    damaged = bytearray(header)
    for at, byte in changes:
        damaged[at % len(header)] = byte

    survives(bytes(damaged), payload)


@quick
@given(st.integers(0, 42), st.integers(0, 7))
@pytest.mark.fault(20)
def test_a_damaged_payload_is_always_refused(at: int, bit: int) -> None:
    header, payload = pack(a_task())
    flipped = bytearray(payload)
    flipped[at] ^= 1 << bit

    for damaged in (bytes(flipped), payload[:at], payload + b"\0" * (at + 1)):
        with pytest.raises(CodecError, match="send it again"):
            codec.decode_task(header, damaged)
