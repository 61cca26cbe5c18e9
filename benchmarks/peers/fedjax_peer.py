"""FedJAX's own federated averaging, with its ``jit`` backend (clients one after the other) or ``pmap``.

Its models are functions of JAX arrays, so the nets stand here once more, images with channels last; weights are turned
into this form before, and back after. A client's batches are cut in the task's order with one indexing operation each,
less work than FedJAX's own shuffled batches. FedJAX fills a last, smaller batch with further examples, which would not
be the same steps, so it runs where sizes are multiples of the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

if not hasattr(jax, "tree_map"):
    jax.tree_map = jax.tree_util.tree_map  # FedJAX calls it; newer versions of JAX have it elsewhere only

import fedjax
from fedjax.algorithms.fed_avg import federated_averaging

from benchmarks.tasks import Task

Params = dict[str, Any]


def dense(p: Params, i: int, x: Any) -> Any:
    return x @ p[f"w{i}"] + p[f"b{i}"]


def conv(p: Params, i: int, x: Any) -> Any:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p[f"w{i}"], (1, 1), "VALID", dimension_numbers=layout) + p[f"b{i}"]


def pool(x: Any) -> Any:
    """2×2 maxima; by reshaping, whose gradient is faster on a CPU than that of ``reduce_window``."""
    n, height, width, depth = x.shape
    return x.reshape(n, height // 2, 2, width // 2, 2, depth).max(axis=(2, 4))


def logistic(p: Params, x: Any) -> Any:
    return dense(p, 0, x)


def two_nn(p: Params, x: Any) -> Any:
    return dense(p, 2, jax.nn.relu(dense(p, 1, jax.nn.relu(dense(p, 0, x)))))


def lenet(p: Params, x: Any) -> Any:
    x = jax.nn.relu(pool(conv(p, 1, jax.nn.relu(pool(conv(p, 0, x))))))
    x = jax.nn.relu(dense(p, 2, x.reshape(len(x), -1)))
    return dense(p, 4, jax.nn.relu(dense(p, 3, x)))


def pfl_cnn(p: Params, x: Any) -> Any:
    x = pool(jax.nn.relu(conv(p, 1, jax.nn.relu(conv(p, 0, x)))))
    return dense(p, 3, jax.nn.relu(dense(p, 2, x.reshape(len(x), -1))))


# A net, the shapes of PyTorch's weights, and which of them sees the flattened image, of what shape.
Form = tuple[Callable[[Params, Any], Any], list[tuple[int, ...]], tuple[int, tuple[int, int, int]] | None]
FORMS: dict[str, Form] = {
    "logistic": (logistic, [(10, 784)], None),
    "2nn": (two_nn, [(200, 784), (200, 200), (10, 200)], None),
    "lenet": (lenet, [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)], (2, (16, 5, 5))),
    "pfl-cnn": (pfl_cnn, [(32, 3, 3, 3), (64, 32, 3, 3), (128, 12544), (10, 128)], (2, (64, 14, 14))),
}


def from_torch(form: Form, flat: np.ndarray) -> Params:
    """Weight and bias of each layer, from PyTorch's order of axes to JAX's."""
    _, shapes, flattened = form
    params, at = Params(), 0
    for i, shape in enumerate(shapes):
        size = int(np.prod(shape))
        w, b = flat[at : at + size].reshape(shape), flat[at + size : at + size + shape[0]]
        if flattened is not None and i == flattened[0]:
            w = w.reshape(shape[0], *flattened[1]).transpose(0, 2, 3, 1).reshape(shape)
        params[f"w{i}"] = jnp.asarray(w.T if len(shape) == 2 else w.transpose(2, 3, 1, 0))
        params[f"b{i}"] = jnp.asarray(b)
        at += size + shape[0]
    return params


def to_torch(form: Form, params: Params) -> np.ndarray:
    _, shapes, flattened = form
    parts = list[np.ndarray]()
    for i, shape in enumerate(shapes):
        w = np.asarray(params[f"w{i}"])
        w = w.T if len(shape) == 2 else w.transpose(3, 2, 0, 1)
        if flattened is not None and i == flattened[0]:
            depth, height, width = flattened[1]
            w = w.reshape(shape[0], height, width, depth).transpose(0, 3, 1, 2)
        parts += [w.reshape(-1), np.asarray(params[f"b{i}"])]
    return np.concatenate(parts)


class Shard(fedjax.ClientDataset):
    """A client's examples in the order of this round."""

    def __init__(self, x: np.ndarray, y: np.ndarray, order: np.ndarray) -> None:
        super().__init__({"x": x, "y": y})
        self._order = order

    def shuffle_repeat_batch(self, hparams: Any = None, **named: Any) -> Iterator[dict[str, np.ndarray]]:
        for first in range(0, len(self._order), hparams.batch_size):
            rows = self._order[first : first + hparams.batch_size]
            yield {name: values[rows] for name, values in self.raw_examples.items()}


def gradient(net: Callable[[Params, Any], Any]) -> Any:
    def loss(params: Params, batch: Any, rng: Any) -> Any:
        scores = jax.nn.log_softmax(net(params, batch["x"]))
        return -jnp.take_along_axis(scores, batch["y"][:, None], axis=1).mean()

    return jax.grad(loss)


def main(task: Task, out: Path, backend: str) -> None:
    if task.net not in FORMS or any(task.size(i) % task.batch for i in range(task.shards)):
        sys.exit(f"no equal work: the net {task.net!r} is not here, or sizes are no multiples of the batch")
    form = FORMS[task.net]
    fedjax.set_for_each_client_backend(backend)
    batches = fedjax.ShuffleRepeatBatchHParams(batch_size=task.batch, num_epochs=1)
    optimizers = fedjax.optimizers.sgd(task.lr), fedjax.optimizers.sgd(1.0)
    algorithm = federated_averaging(gradient(form[0]), *optimizers, batches)
    state, keys = algorithm.init(from_torch(form, task.initial)), jax.random.PRNGKey(0)
    images = np.ascontiguousarray(task.x.transpose(0, 2, 3, 1)) if task.x.ndim == 4 else task.x
    labels = task.y.astype(np.int32)
    for round in range(1, task.rounds + 1):
        task.lap()
        keys, *each = jax.random.split(keys, task.cohort + 1)
        asked = list[Any]()
        for (client, order), key in zip(task.asked(round), each, strict=True):
            rows = task.rows(client)
            asked.append((str(client), Shard(images[rows], labels[rows], order), key))
        state, _ = algorithm.apply(state, asked)
        jax.block_until_ready(state.params)
    task.lap()
    task.finish(out, to_torch(form, state.params))


if __name__ == "__main__":
    main(Task(Path(sys.argv[2])), Path(sys.argv[3]), sys.argv[1])
