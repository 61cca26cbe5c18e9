"""Low-rank adapters of a small transformer, trained by clients that write about different things; runs offline.

    python examples/adapters.py            # some minutes on two cores

The text is that of Python's own help (``pydoc_data.topics``, under the PSF licence), which is on every machine that has
Python: a topic is a client. A character model is trained on half of the topics in the usual way; then it is frozen, and
the others federate adapters of rank 4: 20 times fewer numbers cross than the model has.
"""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import shoal
from shoal import lora
from shoal.simulations.federated import ArrayData

LENGTH, WIDTH, LETTERS = 64, 64, 96  # characters of an example, of the model, of the alphabet (printable ASCII)


class Transformer(nn.Module):
    """Next character; two layers, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = partial(nn.TransformerEncoderLayer, WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList([layer(), layer()])
        self.head = nn.Linear(WIDTH, LETTERS)
        mask = torch.full((LENGTH, LENGTH), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.letters(x) + self.places.weight[: x.shape[1]]
        for layer in self.layers:
            h = layer(h, src_mask=self.mask)
        out: Tensor = self.head(h).transpose(1, 2)  # [n, letters, length], as cross-entropy takes it
        return out


def examples(text: str) -> tuple[Tensor, Tensor]:
    """Characters and those that follow, ``[n, LENGTH]`` each."""
    codes = torch.tensor([min(max(ord(letter) - 31, 0), LETTERS - 1) for letter in text])
    rows = (len(codes) - 1) // LENGTH
    return codes[: rows * LENGTH].view(rows, LENGTH), codes[1 : rows * LENGTH + 1].view(rows, LENGTH)


def pretrain(texts: list[str], steps: int = 300) -> dict[str, Tensor]:
    """A base model as anybody would train it."""
    torch.manual_seed(0)
    model = Transformer()
    x, y = (torch.cat(part) for part in zip(*map(examples, texts), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (32,))
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def adapted(base: Path) -> nn.Module:
    """What every participant builds: the base from its file, frozen, with adapters."""
    model = Transformer()
    model.load_state_dict(load_file(base))
    return lora(model, rank=4, only=["layers.*", "head"])


def clients(texts: dict[str, str]) -> ArrayData:
    """A client for each topic; the last fifth of its text tests."""
    xs, ys, offsets, start = list[Tensor](), list[Tensor](), dict[str, tuple[int, int, int]](), 0
    for name, text in texts.items():
        x, y = examples(text)
        offsets[name] = start, start + max(1, len(x) * 4 // 5), start + len(x)
        xs, ys, start = [*xs, x], [*ys, y], start + len(x)
    return ArrayData(torch.cat(xs), torch.cat(ys), offsets, classes=LETTERS)


def main() -> None:
    long = {name: text for name, text in sorted(topics.items()) if len(text) > 10 * LENGTH}
    halves = [dict(list(long.items())[i::2]) for i in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.safetensors"
        save_file(pretrain(list(halves[0].values())), base)
        experiment = shoal.Experiment(
            model=partial(adapted, base),
            data=clients(halves[1]),
            strategy=shoal.FedAvg(),
            local=shoal.LocalTraining(optimizer="adam", lr=0.01, batch_size=16),
            rounds=15,
            cohort=10,
            evaluation=shoal.Evaluation(clients_every=5),
        )
        run = experiment.simulate()
    crossed, whole = len(run.parameters.trainable), sum(p.numel() for p in Transformer().parameters())
    measured = run.metrics["clients_accuracy"].dropna()
    shown = ", ".join(f"{share:.1%} after {number} rounds" for number, share in measured.items())
    print(f"adapters: {crossed:,} of {whole:,} numbers; accuracy on clients' own text: {shown}")


if __name__ == "__main__":
    main()
