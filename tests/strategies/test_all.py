"""What every registered strategy promises."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass, replace
from importlib.metadata import entry_points
from random import Random
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from shoal.protos.errors import RoundError
from shoal.strategies.base import Context, Family, Mine, Scaled, Sent, State, Strategy, Terms, Update, spec, vector
from shoal.strategies.sums import LeafSum, add_up, contribute

Make = Callable[..., Any]
Simulate = Callable[..., tuple[State, list[Mine]]]
Bits = Callable[[Mapping[str, Tensor | float]], Mapping[str, bytes | float]]

STRATEGIES: dict[str, type[Strategy]] = {e.name: e.load() for e in entry_points(group="shoal.strategies")}

OWN_LOSS = {"fedlc", "moon"}  # which quadratics cannot have: tests/strategies/test_losses.py
CONSTANT = {"server_lr_decay": 1.0, "server_lr_warmup": 0}

# The papers' own values; where a paper tunes one (FedAvgM's β, FedProx's μ, the server's η), a value of its grid.
DEFAULTS: dict[str, dict[str, object]] = {
    "ditto": {"lam": 1.0, "personal_epochs": None, "weighting": "examples"},
    "apfl": {"alpha": 0.5, "adapt": True, "weighting": "examples"},
    "fedadagrad": {"server_lr": 0.1, "beta1": 0.0, "tau": 1e-3, "weighting": "examples", **CONSTANT},
    "fedadam": {"server_lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "weighting": "examples", **CONSTANT},
    "fedbabu": {"head": (), "finetune_epochs": 5, "weighting": "examples"},
    "fedbn": {"weighting": "examples"},
    "fedlc": {"tau": 1.0, "weighting": "examples"},
    "fedper": {"head": (), "weighting": "examples"},
    "fedrep": {"head": (), "head_epochs": 10, "weighting": "examples"},
    "fedsam": {"rho": 0.05, "weighting": "examples"},
    "finetune": {"epochs": 1, "weighting": "examples"},
    "lgfedavg": {"head": (), "weighting": "examples"},
    "mimelite": {"beta": 0.9},
    "moon": {"mu": 1.0, "temperature": 0.5, "weighting": "examples"},
    "perfedavg": {"alpha": 0.01, "variant": "hessian-free", "delta": 1e-3, "weighting": "uniform"},
    "pfedme": {"lam": 15.0, "inner_steps": 5, "inner_lr": 0.05, "beta": 1.0, "weighting": "uniform"},
    "fedavg": {"weighting": "examples"},
    "fedavgm": {"server_lr": 1.0, "momentum": 0.9, "nesterov": False, "weighting": "examples", **CONSTANT},
    "feddyn": {"alpha": 0.01},
    "fedexp": {"epsilon": 1e-3, "weighting": "uniform"},
    "fednova": {"momentum": 0.0, "weighting": "examples"},
    "fedprox": {"mu": 0.01, "weighting": "examples"},
    "fedyogi": {"server_lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "weighting": "examples", **CONSTANT},
    "scaffold": {"server_lr": 1.0, "option": 2},
}


@pytest.fixture(params=sorted(STRATEGIES.keys() - OWN_LOSS))
def strategy(request: pytest.FixtureRequest) -> Strategy:
    """Each registered strategy with its defaults."""
    return STRATEGIES[request.param]()


def weighs(strategy: Strategy) -> bool:
    return any(field.name == "weighting" for field in fields(strategy))  # type: ignore[arg-type]


# --- form -----------------------------------------------------------------------------------------------------------


def test_the_registered_ones_are_known() -> None:
    assert STRATEGIES.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_defaults(name: str) -> None:
    assert asdict(STRATEGIES[name]()) == DEFAULTS[name]  # type: ignore[call-overload]


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_the_name_is_that_of_class_and_file(name: str) -> None:
    assert STRATEGIES[name].__name__.lower() == name
    assert STRATEGIES[name].__module__ == f"shoal.strategies.{name}"


def test_it_is_a_frozen_value(strategy: Strategy) -> None:
    assert is_dataclass(strategy)
    for name in [field.name for field in fields(strategy)]:
        with pytest.raises(FrozenInstanceError):
            setattr(strategy, name, getattr(strategy, name))
    twin = type(strategy)()
    assert strategy == twin and hash(strategy) == hash(twin)
    assert pickle.loads(pickle.dumps(strategy)) == strategy


def test_it_is_final_and_one_level_deep(strategy: Strategy) -> None:
    assert getattr(type(strategy), "__final__", False)
    assert type(strategy).__bases__ == (Strategy,)


def test_it_says_what_it_is_and_where_it_comes_from(strategy: Strategy) -> None:
    """A docstring of its own (a dataclass without one gets its signature) and a citation with a year."""
    doc = type(strategy).__doc__ or ""
    assert doc and not doc.startswith(f"{type(strategy).__name__}(")
    assert "\n    Use it " in doc and "\n    Costs " in doc
    assert strategy.family in get_args(Family)
    assert any(word.isdigit() and len(word) == 4 for word in strategy.citation.replace(",", " ").split())


def test_it_accepts_plain_sgd(strategy: Strategy) -> None:
    plain = SimpleNamespace(optimizer="sgd", momentum=0.0, nesterov=False, weight_decay=0.0, clip=None)
    assert strategy.refuses(plain) is None


# --- a round --------------------------------------------------------------------------------------------------------


def begun(strategy: Strategy, clients: list[Any], simulate: Simulate) -> tuple[State, list[Mine]]:
    """State and clients after two rounds, so that nothing is zero by chance."""
    return simulate(strategy, clients, 2)


def multiplied(terms: Terms) -> Mapping[str, Tensor | float]:
    return {name: vector(terms, name) if isinstance(term, Scaled) else term for name, term in terms.items()}


def test_inputs_are_never_changed(strategy: Strategy, quadratics: Make, simulate: Simulate, bits: Bits) -> None:
    """Not the state, what was sent, the client's own, the update, nor the sum."""
    clients = quadratics(3)
    state, mine = begun(strategy, clients, simulate)
    context = Context(2, population=3, asked=3)

    def seen() -> list[Mapping[str, bytes | float]]:
        return [bits(values) for values in watched]

    watched: list[Mapping[str, Tensor | float]] = [state, *mine]
    before = seen()
    sent = strategy.send(state)
    watched += [{"parameters": sent.parameters, **sent.tensors}]
    before += [bits(watched[-1])]
    replies = [strategy.local(client, sent, own) for client, own in zip(clients, mine, strict=True)]
    strategy.personal(clients[0], sent, mine[0])
    assert seen() == before
    watched += [{"delta": update.delta, **update.tensors} for update, _ in replies] + [new for _, new in replies]
    before = seen()
    parts = [contribute(strategy, state, update, context) for update, _ in replies]
    assert seen() == before
    watched += [multiplied(part.terms) for part in parts]
    before = seen()
    total = add_up(parts)
    assert total is not None
    watched += [multiplied(total.terms)]
    before += [bits(watched[-1])]
    strategy.finish(state, total.terms, replace(context, counted=3))
    strategy.init(vector(state, "parameters"))
    strategy.init_client(vector(state, "parameters"))
    assert seen() == before


def test_arrival_order_leaves_no_trace(strategy: Strategy, quadratics: Make, simulate: Simulate, bits: Bits) -> None:
    """40 clients, three leaves: the next state is bit-equal for every order."""
    clients = quadratics(40, dtype=torch.float32)
    state, mine = begun(strategy, clients, simulate)
    sent, context = strategy.send(state), Context(2, population=40, asked=40)
    parts = [
        contribute(strategy, state, strategy.local(client, sent, own)[0], context)
        for client, own in zip(clients, mine, strict=True)
    ]
    results = []
    for seed in range(5):
        sum_ = LeafSum()
        for position in Random(seed).sample(range(40), 40):
            sum_.add(position, parts[position])
        total = sum_.total()
        assert total is not None
        results.append(bits(strategy.finish(state, total.terms, replace(context, counted=40))))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("count", [2, 16, 21])
def test_equal_clients_are_one_client(strategy: Strategy, count: int, quadratics: Make, simulate: Simulate) -> None:
    client = quadratics(3)[0]
    many, of_many = simulate(strategy, [client] * count, 5)
    one, of_one = simulate(strategy, [client], 5)
    assert many.keys() == one.keys()
    for name in one:
        assert (vector(many, name) - vector(one, name)).abs().max() < 1e-12
    for own in of_many:
        assert own.keys() == of_one[0].keys()
        assert all((own[name] - of_one[0][name]).abs().max() < 1e-12 for name in own)


def test_nothing_happens_where_all_agree(strategy: Strategy, quadratic: Make, simulate: Simulate) -> None:
    """Clients whose optimum is the model: not one bit of it moves, however long."""
    clients = [quadratic(torch.full((4,), h), torch.zeros(4), 5.0, 3) for h in (0.5, 1.0, 2.0)]
    state, _ = simulate(strategy, clients, 10)
    assert torch.equal(vector(state, "parameters"), torch.zeros(4))


def test_it_learns(strategy: Strategy, quadratics: Make, simulate: Simulate) -> None:
    """With one client every strategy descends that client's loss."""
    client = quadratics(3)[0]
    state, _ = simulate(strategy, [client], 30)
    assert client.loss(vector(state, "parameters")) < client.loss(torch.zeros(5).double())


def weighted(strategy: Strategy, examples: float, quadratics: Make) -> State:
    """One round of clients that report this number of examples."""
    client, context = quadratics(3)[0], Context(0, population=3, asked=3)
    start = torch.zeros_like(client.h)
    state = strategy.init(start)
    update, _ = strategy.local(client, strategy.send(state), strategy.init_client(start))
    total = add_up(contribute(strategy, state, replace(update, examples=examples), context) for _ in range(3))
    assert total is not None
    return strategy.finish(state, total.terms, replace(context, counted=3))


@pytest.mark.parametrize("examples", [0.0, -1.0, math.nan, math.inf])
def test_weights_that_make_no_mean_are_an_error(strategy: Strategy, examples: float, quadratics: Make) -> None:
    if not weighs(strategy):
        pytest.skip("its clients weigh the same: it divides by how many were counted, which is never 0")
    by_examples, uniform = (replace(strategy, weighting=w) for w in ("examples", "uniform"))  # type: ignore[type-var]
    with pytest.raises(RoundError, match="positive number of examples"):
        weighted(by_examples, examples, quadratics)
    assert vector(weighted(uniform, examples, quadratics), "parameters").isfinite().all()


def test_examples_weigh_only_where_they_are_declared_to(
    strategy: Strategy, quadratics: Make, simulate: Simulate, bits: Bits
) -> None:
    """With equal say, nobody's number of examples leaves a trace in the bits; with examples, it does."""
    clients = quadratics(5)
    alike = [replace(client, examples=7.0) for client in clients]
    equal_say = replace(strategy, weighting="uniform") if weighs(strategy) else strategy  # type: ignore[type-var]
    assert bits(simulate(equal_say, clients, 3)[0]) == bits(simulate(equal_say, alike, 3)[0])
    if weighs(strategy):
        by_examples = replace(strategy, weighting="examples")  # type: ignore[type-var]
        assert bits(simulate(by_examples, clients, 3)[0]) != bits(simulate(by_examples, alike, 3)[0])


# --- what crosses and what is kept ----------------------------------------------------------------------------------


def forms(values: Mapping[str, Tensor | float]) -> dict[str, object]:
    return {n: (v.dtype, v.shape) if isinstance(v, Tensor) else type(v) for n, v in values.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_form_of_every_value_stays(
    strategy: Strategy, dtype: torch.dtype, quadratics: Make, simulate: Simulate
) -> None:
    """Names, dtypes and shapes of state, clients' own and replies are the same in every round: float32 stays so."""
    clients = quadratics(4, dtype=dtype)
    start = torch.zeros(5, dtype=dtype)
    state, mine = begun(strategy, clients, simulate)
    assert forms(state) == forms(strategy.init(start))
    assert forms(state)["parameters"] == (dtype, (5,))
    assert [forms(own) for own in mine] == [forms(strategy.init_client(start))] * 4
    context, names = Context(0, population=4, asked=4), set()
    for at, own in ((strategy.init(start), strategy.init_client(start)), (state, mine[0])):
        update, _ = strategy.local(clients[0], strategy.send(at), own)
        assert update.delta.dtype is dtype and update.delta.shape == (5,)
        names.add(frozenset(strategy.contribute(at, update, context)))
    assert len(names) == 1


def test_the_reply_brings_what_was_sent_and_no_more(strategy: Strategy, quadratics: Make, simulate: Simulate) -> None:
    """Names, dtypes and shapes are those that were declared; a task that declares no reply means: as sent."""
    clients = quadratics(3)
    state, mine = begun(strategy, clients, simulate)
    sent = strategy.send(state)
    update, _ = strategy.local(clients[0], sent, mine[0])
    assert {name: spec(tensor) for name, tensor in update.tensors.items()} == strategy.reply(sent)
    assert forms({"": update.delta}) == forms({"": sent.parameters})
    assert (update.examples, update.steps) == (clients[0].examples, clients[0].steps)
    assert torch.equal(sent.parameters, vector(state, "parameters"))


def test_a_client_gets_only_what_was_sent(strategy: Strategy, quadratics: Make, simulate: Simulate, bits: Bits) -> None:
    """The same reply from a ``Sent`` and a ``mine`` that went through bytes: nothing is remembered on the side."""
    clients = quadratics(3)
    state, mine = begun(strategy, clients, simulate)
    sent = strategy.send(state)
    crossed = Sent(sent.parameters.clone(), load(save(dict(sent.tensors))), json.loads(json.dumps(dict(sent.settings))))

    def reply(strategy: Strategy, sent: Sent, own: Mine) -> tuple[object, ...]:
        update, new = strategy.local(clients[0], sent, own)
        return bits({"delta": update.delta}), bits(update.tensors), bits(new), update.steps, update.lr_sum

    there = pickle.loads(pickle.dumps(strategy))
    assert reply(strategy, sent, mine[0]) == reply(there, crossed, load(save(dict(mine[0]))))


def test_a_checkpoint_is_the_state(strategy: Strategy, quadratics: Make, simulate: Simulate, bits: Bits) -> None:
    """Through safetensors and JSON and into a new object: the run goes on bit-equal."""
    clients = quadratics(5)
    state, mine = simulate(strategy, clients, 3)
    tensors = save({name: value for name, value in state.items() if isinstance(value, Tensor)})
    numbers = json.dumps({name: value for name, value in state.items() if not isinstance(value, Tensor)})
    kept = [save(dict(own)) for own in mine]
    loaded: State = {**load(tensors), **json.loads(numbers)}
    assert bits(loaded) == bits(state)
    straight, own_straight = simulate(strategy, clients, 3, state=state, mine=mine)
    resumed, own_resumed = simulate(type(strategy)(), clients, 3, state=loaded, mine=[load(own) for own in kept])
    assert bits(resumed) == bits(straight)
    assert [bits(own) for own in own_resumed] == [bits(own) for own in own_straight]


def test_the_personal_model_is_a_vector_of_the_model(strategy: Strategy, quadratics: Make, simulate: Simulate) -> None:
    clients = quadratics(3)
    state, mine = begun(strategy, clients, simulate)
    assert strategy.personal(clients[0], strategy.send(state), mine[0]).shape == (5,)


def test_terms_add_up(strategy: Strategy, quadratics: Make) -> None:
    """The sum of a client's terms with themselves is that of two such clients: terms are plain vectors and numbers."""
    client, context = quadratics(3)[0], Context(0, population=2, asked=2)
    start = torch.zeros_like(client.h)
    state = strategy.init(start)
    update: Update = strategy.local(client, strategy.send(state), strategy.init_client(start))[0]
    terms: Terms = strategy.contribute(state, update, context)
    for name, term in terms.items():
        value = vector(terms, name) if isinstance(term, Scaled) else term
        assert isinstance(value, Tensor | float | int)
        assert not isinstance(value, Tensor) or value.shape == start.shape
