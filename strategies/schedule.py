"""The server's learning rate from round to round (Reddi et al. 2021, ICLR, arXiv 2003.00295, Appendix D.3)."""

from __future__ import annotations

__all__ = ["scheduled"]


def scheduled(lr: float, decay: float, warmup: int, round: int) -> float:
    """The learning rate of a round, the first being 1: in equal steps up to ``lr`` within ``warmup`` rounds.

    Then it falls by the factor ``decay`` with each round.
    """
    if round < warmup:
        return lr * round / warmup
    return lr * decay ** max(0, round - max(warmup, 1))
