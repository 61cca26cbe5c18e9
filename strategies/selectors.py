"""Selectors: who is asked in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

__all__ = ["Selector", "Uniform"]

SelectorState = Mapping[str, Any]


class Selector(ABC):
    """Chooses cohorts. State, if a selector learns, is a value: a checkpoint holds it."""

    def init(self) -> SelectorState:
        """The state before the first round."""
        return {}

    @abstractmethod
    def select(
        self, state: SelectorState, population: Sequence[str], count: int, round: int, rng: np.random.Generator
    ) -> Sequence[str]:
        """``count`` different clients; their order is the order of the round's sum."""

    def observe(self, state: SelectorState, outcomes: Mapping[str, Mapping[str, float]]) -> SelectorState:
        """The next state, from the metrics of the clients that were counted."""
        return state


@final
@dataclass(frozen=True)
class Uniform(Selector):
    """Every set of ``count`` clients is equally likely (McMahan et al. 2017, Algorithm 1)."""

    def select(
        self, state: SelectorState, population: Sequence[str], count: int, round: int, rng: np.random.Generator
    ) -> Sequence[str]:
        return [population[i] for i in rng.choice(len(population), size=count, replace=False)]
