"""What a comparison says in words, and that it says no more than its numbers do."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.simulations.answer import answer, latex, on_significance, short_table
from shoal.simulations.comparison import Row, rows

BASE = [0.70, 0.71, 0.69, 0.72, 0.70, 0.68, 0.73, 0.70]
UP = [value + 0.02 + 0.001 * seed for seed, value in enumerate(BASE)]
DOWN = [value - 0.03 - 0.001 * seed for seed, value in enumerate(BASE)]
MIXED = [value + 0.011 * (-1) ** seed for seed, value in enumerate(BASE)]


def run(value: float, target: int | None = None) -> dict[str, Any]:
    spent = {"seconds": 1.0, "bytes_up": 1e6, "bytes_down": 1e6}
    return {
        "rounds": 30, "failed": 0, **spent, "best": {}, "mean_of_last_10": {},
        "last": {"test_accuracy": value, "test_loss": 1 - value},
        "target": {"accuracy": {"round": target, **spent}},
    }  # fmt: skip


def table(metric: str = "test_accuracy", target: dict[str, float] | None = None, **arms: list[float]) -> list[Row]:
    there = {("", arm, seed): run(value) for arm, values in arms.items() for seed, value in enumerate(values)}
    seeds = max(map(len, arms.values()))
    return rows([""], list(arms), range(seeds), there, metric, target or {})


def test_a_difference_that_is_shown() -> None:
    found = answer(table(fedavg=BASE, scaffold=UP, fedadam=DOWN, fedprox=MIXED))

    assert found == (
        "Accuracy is better with scaffold than with fedavg (+0.0235, 95 % CI +0.0215 to +0.0255, p = 0.023); "
        "it is worse with fedadam than with fedavg (-0.0335, 95 % CI -0.0355 to -0.0315, p = 0.023). "
        "For fedprox no difference from fedavg is shown, which does not mean that there is none."
    )


def test_where_lower_is_better() -> None:
    """The loss is 1 minus the accuracy: scaffold's is lower, and that is better."""
    found = answer(table("test_loss", fedavg=BASE, scaffold=UP))

    assert found.startswith("Loss is better with scaffold than with fedavg (-0.0235, ")
    assert "this holds for this experiment and its seeds" in found.lower()


def test_nothing_is_shown() -> None:
    found = answer(table(fedavg=BASE, fedprox=MIXED))

    assert found.startswith("The best mean accuracy over 8 seeds is that of fedavg, 0.7037. ")
    assert "better" not in found and "For fedprox no difference from fedavg is shown" in found


def test_means_over_different_seeds_are_not_ranked() -> None:
    found = answer(table(fedavg=BASE[:2], scaffold=[0.9]))

    assert found.startswith(
        "Means of accuracy are over different seeds, because not all runs finished: none is called the best. "
    )
    assert "0.9" not in found


def test_a_lead_that_is_not_shown_is_hedged() -> None:
    lead = [value + 0.02 * (-1) ** seed + 0.004 for seed, value in enumerate(BASE)]
    found = answer(table(fedavg=BASE, fedprox=lead))

    assert found.startswith(
        "The best mean accuracy over 8 seeds is that of fedprox, 0.7077, but its difference from fedavg is not shown "
        "to be more than chance (+0.0040, 95 % CI "
    )


def test_too_few_seeds_name_how_many_would_do() -> None:
    found = answer(table(fedavg=BASE[:3], scaffold=UP[:3], fedprox=MIXED[:3], fedadam=DOWN[:3]))

    assert "p =" not in found and "more than chance" in found
    assert found.endswith(
        "No p-values: with 3 seeds a two-sided paired sign-flip test cannot give less than 2/2^3 = 0.25, with Holm's "
        "correction over 3 comparisons 0.75; 7 seeds would do."
    )


@pytest.mark.parametrize("others", [1, 3, 4, 12])
@pytest.mark.parametrize("seeds", [1, 2, 5, 6, 7, 8])
def test_no_p_below_the_seeds_that_are_needed(others: int, seeds: int) -> None:
    made = table(fedavg=BASE[:seeds], **{f"arm{i}": UP[:seeds] for i in range(others)})  # type: ignore[arg-type]
    text = " ".join(cell for line in short_table(made) for cell in line) + answer(made) + latex(made)

    if seeds < made[0].seeds_needed:
        assert "p (Holm)" not in text and "is better" not in text and "^{*}" not in text
        assert f"{made[0].seeds_needed} seeds would do" in text
    else:
        assert "p (Holm)" in text and "Accuracy is better with arm0 than" in text and text.count("^{*}") == others


def test_one_arm_and_no_run() -> None:
    assert answer(table(fedavg=BASE)) == (
        "The mean accuracy of fedavg over 8 seeds is 0.7037. Nothing is compared: name a second strategy."
    )
    assert answer(rows([""], ["a", "b"], range(8), {}, "test_accuracy", {})).startswith("No run finished. ")


def test_each_scenario_has_its_sentence() -> None:
    there = {
        (scenario, arm, seed): run(value)
        for scenario, arms in {"alpha=0.1": {"a": BASE, "b": UP}, "alpha=1": {"a": BASE, "b": MIXED}}.items()
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    }
    found = answer(rows(["alpha=0.1", "alpha=1"], ["a", "b"], range(8), there, "test_accuracy", {}))

    assert found.startswith("With alpha=0.1, accuracy is better with b than with a (+0.0235")
    assert " With alpha=1, " in found and "For b with alpha=1 no difference from a is shown" in found


def test_the_short_table() -> None:
    there = {("", "a", s): run(v, target=10 if s else None) for s, v in enumerate(BASE)}
    there |= {("", "b", s): run(v, target=None) for s, v in enumerate(UP[:7])}
    made = rows([""], ["a", "b"], range(8), there, "test_accuracy", {"accuracy": 0.8})
    head, a, b = short_table(made)

    assert head == ["strategy", "accuracy", "minus a", "p (Holm)", "rounds to 0.8", "MB to 0.8"]
    assert a[0] == "a" and a[2:] == ["–", "–", "≥ 12.5 (7/8)", "≥ 2.0"]
    assert b[1].endswith("(7/8 seeds)") and b[2].startswith("+0.0230 [") and b[3:] == ["0.016", "not reached (0/7)",
                                                                                      "not reached"]  # fmt: skip


def test_latex_is_escaped() -> None:
    text = latex(table(**{"my_file.py:A&B": BASE, "b": UP}))  # type: ignore[arg-type]

    assert r"my\_file.py:A\&B" in text and text.count(r"\\") == 3
    assert text.count("{") == text.count("}") and "$^{*}$" in text
    assert r"\begin{tabular}{lrrr}" in text


def test_what_is_tested() -> None:
    assert on_significance(table(a=BASE)) == "One strategy alone: nothing is tested."
    assert "1 seed a two-sided" in on_significance(table(a=BASE[:1], b=UP[:1]))
    assert on_significance(table(a=BASE, b=UP)).endswith("the smallest there can be with 8 seeds is 0.0078.")
