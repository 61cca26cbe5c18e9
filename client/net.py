"""A PyTorch module whose trainable parameters are one flat vector.

The module stays resident: a client's task copies the sent vector in, trains, and reads the difference out. No module,
optimizer or state dict is built for a client.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from shoal.protos import seeds
from shoal.protos.errors import ExperimentError, InvalidUpdate
from shoal.protos.parameters import Entry, Layout, Parameters, Segment

__all__ = ["Net", "build_module", "layout_of", "load_parameters", "parameters_of", "to_numpy"]

FLOATS = (torch.float32, torch.float64)


def _segment(name: str, tensor: Tensor, trained: bool) -> Segment:
    if tensor.is_complex():
        raise ExperimentError(f"tensor {name!r} is complex; Shoal averages real numbers only")
    if isinstance(tensor, nn.Parameter):
        if not trained:
            return Segment.FROZEN
        if tensor.dtype not in FLOATS:
            raise ExperimentError(f"parameter {name!r} is {tensor.dtype}; train in float32 (model.float()) or float64")
        return Segment.TRAINABLE
    return Segment.BUFFERS if tensor.is_floating_point() else Segment.COUNTERS


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Each tensor of the state once, in the state's order; tied tensors under their first name."""
    first: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: first[name] for name in module.state_dict(keep_vars=True) if name in first}


def layout_of(module: nn.Module) -> Layout:
    """The module's layout: parameters that require a gradient are trainable, the others frozen."""
    entries = []
    for name, tensor in _tensors(module).items():
        segment = _segment(name, tensor, tensor.requires_grad)
        entries.append(Entry(name, segment, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
    layout = Layout(tuple(entries))
    if not layout.size(Segment.TRAINABLE):
        raise ExperimentError("the model has no trainable parameters; set requires_grad on what clients shall train")
    _ = layout.dtype  # raises where a model mixes float32 and float64
    return layout


def _gather(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    if not tensors:
        return torch.zeros(0, dtype=dtype)
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])


def parameters_of(module: nn.Module) -> Parameters[Tensor]:
    """A copy of the module's values."""
    layout, tensors = layout_of(module), _tensors(module)
    dtype = getattr(torch, layout.dtype)

    def values(segment: Segment, kind: torch.dtype) -> Tensor:
        return _gather([tensors[e.name] for e in layout.of(segment)], kind)

    frozen = {e.name: tensors[e.name].detach().clone() for e in layout.of(Segment.FROZEN)}
    return Parameters(
        layout,
        values(Segment.TRAINABLE, dtype),
        values(Segment.BUFFERS, dtype),
        values(Segment.COUNTERS, torch.int64),
        frozen=frozen,
    )


def build_module(make_model: Callable[[], nn.Module], seed: int, dtype: str) -> nn.Module:
    """The model with the seed's initial weights, the same in every process; the caller's generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.integer(seed, "model"))
        module = make_model()
    return module.to(getattr(torch, dtype))


class Net:
    """A resident module over the flat vector :attr:`flat` ``[P]``.

    :attr:`weights` are the module's own parameters, :attr:`views` the same memory outside of autograd.
    """

    def __init__(self, module: nn.Module, device: str = "cpu") -> None:
        self.module = module.to(device).train()  # by the model's own train(), which may hold a part in evaluation
        self.layout = layout_of(module)
        self.weights = [tensor for tensor in _tensors(module).values() if tensor.requires_grad]
        self.flat = _gather(self.weights, self.dtype)
        self._shapes = [tensor.shape for tensor in self.weights]
        self._sizes = [tensor.numel() for tensor in self.weights]
        self._channels_last: dict[torch.Size, bool] = {}
        for part in module.modules():
            if isinstance(part, nn.MaxPool2d):
                _PooledGradient(part)
        self._bind()
        self._outside = self._outside_the_state()
        self._homes = {segment: self._owners(segment) for segment in (Segment.BUFFERS, Segment.COUNTERS)}
        #: of the tensors that weights, buffers and counters consist of
        self.shapes = tuple(
            [torch.Size(entry.shape) for entry in self.layout.of(segment)]
            for segment in (Segment.TRAINABLE, Segment.BUFFERS, Segment.COUNTERS)
        )

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.layout.dtype)  # type: ignore[no-any-return]

    def arrange(self, x: Tensor) -> Tensor:
        """Images with their channels last, as a copy: convolutions and pooling are up to twice as fast so.

        Where the model's own code cannot take it (``x.view`` on what is no longer contiguous), or has no convolution,
        images stay as they are, as all else does. That depends on shapes alone.
        """
        if x.dim() != 4 or not x.is_floating_point():
            return x
        if x.shape[1:] not in self._channels_last:
            self._channels_last[x.shape[1:]] = self._takes_channels_last(x[:2])
        return _channels_last(x) if self._channels_last[x.shape[1:]] else x

    def _takes_channels_last(self, x: Tensor) -> bool:
        if not any(isinstance(module, nn.Conv2d) for module in self.module.modules()):
            return False
        training = self.module.training
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self.module.eval()(_channels_last(x))
        except Exception:  # what is wrong otherwise shows in training
            return False
        finally:
            self.module.train(training)
        return True

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector ``[P]`` in the shapes of :attr:`weights`."""
        parts = torch.split(vector, self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _bind(self) -> None:
        self.views = self.split(self.flat)
        for weight, view in zip(self.weights, self.views, strict=True):
            weight.data = view

    def _outside_the_state(self) -> list[tuple[nn.Module, str, Tensor | None]]:
        """Copies of non-persistent buffers: they never cross, and must not carry anything from one client to the next.

        Some are not there at first: a model may make them, or larger ones, when it runs.
        """
        inside = self.module.state_dict().keys()
        return [
            (owner, name, None if buffer is None else buffer.clone())
            for path, owner in self.module.named_modules()
            for name, buffer in owner._buffers.items()
            if (f"{path}.{name}" if path else name) not in inside
        ]

    def collect(self) -> None:
        """Take in weights that code of the user's own has bound anew (``p.data = …``), and bind them back."""
        names = [entry.name for entry in self.layout.of(Segment.TRAINABLE)]
        now = dict(self.module.named_parameters(remove_duplicate=False))
        for name, weight, view in zip(names, self.weights, self.views, strict=True):
            found = now.get(name)
            if found is None or found.shape != view.shape:
                raise InvalidUpdate(f"parameter {name!r} is gone or has another shape after fit; train it in place")
            if found.data_ptr() != view.data_ptr():
                view.copy_(found.detach())
            if found is not weight:
                owner, _, attribute = name.rpartition(".")
                setattr(self.module.get_submodule(owner), attribute, weight)
        self._bind()

    def _owners(self, segment: Segment) -> list[tuple[nn.Module, str]]:
        """Where each buffer hangs, not the tensor itself: a module may bind a new tensor to the name."""
        paths = [entry.name.rpartition(".") for entry in self.layout.of(segment)]
        return [(self.module.get_submodule(owner), name) for owner, _, name in paths]

    def restore(self, buffers: Tensor | None, counters: Tensor | None) -> None:
        """Copy buffers and counters in, where given. What is outside the state becomes as it was at first."""
        for owner, name, first in self._outside:
            buffer = getattr(owner, name)
            if buffer is None or first is None or buffer.shape != first.shape:
                setattr(owner, name, None if first is None else first.clone())
            else:
                buffer.copy_(first)
        for segment, vector in ((Segment.BUFFERS, buffers), (Segment.COUNTERS, counters)):
            homes = self._homes[segment]
            if vector is None or not homes:
                continue
            sizes = [entry.size for entry in self.layout.of(segment)]
            for (owner, name), part in zip(homes, torch.split(vector, sizes), strict=True):
                buffer = getattr(owner, name)
                buffer.copy_(part.view(buffer.shape))

    def tensors(self, segment: Segment) -> list[Tensor]:
        """The buffers or counters themselves."""
        return [getattr(owner, name) for owner, name in self._homes[segment]]

    def read(self, segment: Segment) -> Tensor | None:
        """A copy of the buffers ``[B]`` or counters ``[C]``; None where the model has none."""
        homes = self._homes[segment]
        kind = torch.int64 if segment is Segment.COUNTERS else self.dtype
        return _gather(self.tensors(segment), kind) if homes else None


class _PooledGradient:
    """Lays the gradient of pooled images out as these, unless it comes so.

    From behind ``Flatten`` it comes with its channels first, and then the pooling's backward pass copies the gradient
    of its whole input, twice.
    """

    def __init__(self, pooling: nn.MaxPool2d) -> None:
        self._handle = pooling.register_forward_hook(self._watch)

    def _watch(self, pooling: nn.Module, given: tuple[Tensor, ...], pooled: Tensor | tuple[Tensor, Tensor]) -> None:
        if isinstance(pooled, Tensor) and pooled.requires_grad and _has_channels_last(pooled):
            pooled.register_hook(self._lay)  # type: ignore[no-untyped-call]

    def _lay(self, gradient: Tensor) -> Tensor:
        if _has_channels_last(gradient):
            self._handle.remove()
        return gradient.contiguous(memory_format=torch.channels_last)


def _has_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    """A copy; ``contiguous`` leaves images of one channel as they are, and convolutions do not take the hint."""
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array, copied only from another device."""
    return tensor.detach().cpu().numpy()


@torch.no_grad()
def load_parameters(module: nn.Module, parameters: Parameters[Tensor]) -> None:
    """Copy named values into a module of the same layout."""
    here = _tensors(module)
    for name, value in parameters.named().items():
        here[name].copy_(value)
