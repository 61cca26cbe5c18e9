"""What came of a trial."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.chaos.world import World

__all__ = ["Hit", "Outcome", "told"]


@dataclass
class Hit:
    """One fault of a trial; ``recovery`` is in seconds, None where the run was over before another answer."""

    fault: str
    group: str
    survived: bool = False
    recovery: float | None = None


@dataclass
class Outcome:
    """One trial. ``problems`` are empty if it ended as if nothing had happened."""

    seed: int
    world: World
    hits: list[Hit] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    folder: str | None = None

    @property
    def command(self) -> str:
        return f"python -m tests.chaos.driver --seed {self.seed} --trials 1"


def told(outcome: Outcome) -> str:
    """A line for a trial, and everything about one that failed."""
    world, hits = outcome.world, outcome.hits
    line = (
        f"seed {outcome.seed}: {world.strategy}, {world.sites} clients, {world.rounds} rounds"
        f"{', TLS' if world.tls else ''}{', lenient' if world.lenient else ''}: {len(hits)} faults in "
        f"{outcome.seconds:.0f} s: "
    )
    if not outcome.problems:
        return line + "as if nothing had happened"
    last = f"\nlast fault: {hits[-1].fault}" if hits else ""
    problems = "\n".join(outcome.problems)
    return f"{line}FAILED{last}\n{problems}\nfolder: {outcome.folder}\nagain: {outcome.command}"
