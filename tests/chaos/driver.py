"""The campaign: trials drawn from seeds, in which real servers and clients are killed and their network fails.

    python -m tests.chaos.driver --trials 20 --seed 1        # or --minutes 30
    python -m tests.chaos.driver --seed 17 --trials 1        # one trial again

A trial is one run of a drawn experiment (:mod:`tests.chaos.world`), in which faults (:mod:`tests.chaos.deck`) strike
one after the other until it is finished. Then the run folder is compared with an undisturbed simulation of the same
experiment. A seed draws the same world and the same faults again; when exactly they meet which message, the machine
decides. Trials that fail keep their folder: traces, logs of all processes, state of all clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.chaos.cast import Broken
from tests.chaos.deck import DECK
from tests.chaos.faults import Blow, Fault
from tests.chaos.outcome import Hit, Outcome, told
from tests.chaos.stage import PATIENCE, Stage
from tests.chaos.table import counted, publish, published, rendered
from tests.chaos.world import World, differences

__all__ = ["Limits", "campaign", "play"]

LONG = 0.1  # of the trials have the faults that take more than a minute
SIMULATING = asyncio.Lock()  # torch has one random generator a process


@dataclass(frozen=True)
class Limits:
    """How much one trial is. ``only`` are words in a fault's ``group: name``; with them, long ones come, too."""

    faults: int = 1000
    patience: float = PATIENCE
    small: bool = False
    long: bool = True
    only: str = ""


async def play(seed: int, folder: Path, limits: Limits = Limits()) -> Outcome:
    """One trial in a new folder."""
    rng = random.Random(seed)
    world = World.draw(rng, limits.small)
    outcome, began = Outcome(seed, world), time.monotonic()
    world.prepare(folder)
    stage = Stage(world, folder, rng, limits.patience)
    try:
        try:
            await stage.open()
            await stage.answers(world.sites)
            await _strike(stage, _deck(world, rng, limits), limits.faults, outcome)
            await stage.finish()
        finally:
            await stage.close()
        async with SIMULATING:
            reference = await asyncio.to_thread(world.simulate, folder, stage.run)
        outcome.problems += differences(world, stage.run, reference.path)
        others = [path.name for path in stage.run.parent.iterdir() if path.name[0] != "." and path != stage.run]
        outcome.problems += [f"there are other runs: {others}"] if others else []
    except Broken as error:
        outcome.problems.append(str(error))
    except Exception:  # a defect of the harness, or a folder that cannot be read: a failed trial, not a lost campaign
        outcome.problems.append(traceback.format_exc())
    outcome.seconds, outcome.folder = time.monotonic() - began, str(folder)
    (folder / "outcome.json").write_text(json.dumps(asdict(outcome), indent=2))
    return outcome


def _deck(world: World, rng: random.Random, limits: Limits) -> list[Fault]:
    """All faults that make sense in the world, shuffled."""
    long = limits.long and (rng.random() < LONG or bool(limits.only))
    cards = [card for card in DECK if limits.only in f"{card.group}: {card.name}"]
    cards = [card for card in cards if (world.lenient or not card.lenient) and (world.tls or not card.tls)]
    cards = [card for card in cards if (long or not card.long) and (world.strategy == "scaffold" or not card.stateful)]
    return rng.sample(cards, len(cards))


async def _strike(stage: Stage, deck: list[Fault], most: int, outcome: Outcome) -> None:
    """Fault after fault, each when the run has gone on after the one before, until the run is over."""
    for number in range(most if deck else 0):
        if stage.over:
            return
        fault = deck[number % len(deck)]
        hit = Hit(fault.name, fault.group)
        outcome.hits.append(hit)
        blow: Blow | None = await fault.strike(stage)
        if blow is None:
            outcome.hits.remove(hit)  # it never struck
            return
        hit.recovery = await stage.recovered(blow.healed, blow.whose)
        hit.survived = True
        await stage.answers(stage.rng.randint(0, stage.world.sites))


async def campaign(
    seeds: Iterable[int],
    jobs: int,
    going: Callable[[], bool],
    out: Path,
    limits: Limits,
    say: Callable[[Outcome], None],
) -> None:
    """Trials side by side, as long as there are seeds and ``going`` says so; folders of failed ones stay in ``out``."""
    left = iter(seeds)

    async def worker() -> None:
        while going() and (seed := next(left, None)) is not None:
            folder = Path(tempfile.mkdtemp(prefix=f"trial-{seed}-", dir=out))
            outcome = await play(seed, folder, limits)
            if not outcome.problems:
                await asyncio.to_thread(shutil.rmtree, folder)
            say(outcome)

    async with asyncio.TaskGroup() as group:
        for _ in range(jobs):
            group.create_task(worker())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1, help="of the first trial; the others follow")
    parser.add_argument("--trials", type=int, default=None, help="default: as many as there is time for")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which no trial is begun")
    parser.add_argument("--only", default="", help="faults with these words, such as 'server: ' or 'half-open'")
    parser.add_argument("--faults", type=int, default=Limits.faults, help="at most in a trial")
    parser.add_argument("--jobs", type=int, default=2, help="trials side by side")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "shoal-chaos")
    parser.add_argument("--publish", action="store_true", help="write the results and the table of the docs")
    parser.add_argument("--add", action="store_true", help="to the results that there are")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * given.minutes
    seeds = range(given.seed, sys.maxsize if given.trials is None else given.seed + given.trials)

    limits = Limits(faults=given.faults, only=given.only)

    before, outcomes = published() if given.add else None, list[Outcome]()

    def say(outcome: Outcome) -> None:
        print(told(outcome), flush=True)
        outcomes.append(outcome)
        if given.publish:  # after each trial: a campaign is long
            publish(counted(outcomes, before))

    asyncio.run(campaign(seeds, given.jobs, lambda: time.monotonic() < ends, given.folder.resolve(), limits, say))
    print(rendered(counted(outcomes, before)))
    return 1 if any(outcome.problems for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
