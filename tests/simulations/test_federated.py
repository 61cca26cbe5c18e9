import pickle

import pytest
import torch

from shoal.client.data import Shard
from shoal.protos.errors import DataError
from shoal.simulations import federated
from shoal.simulations.federated import ArrayData, LazyData, Numbered


def test_array_data_hands_out_views() -> None:
    data = ArrayData(torch.arange(6.0)[:, None], torch.arange(6), {"a": (0, 2, 3), "b": (3, 6, 6)}, classes=6)

    shard = data.shard("a")
    assert shard.x.tolist() == [[0], [1]]
    assert shard.held_out is not None
    assert shard.held_out.y.tolist() == [2]
    assert shard.x.untyped_storage().data_ptr() == data.x.untyped_storage().data_ptr()
    assert data.shard("b").held_out is None
    assert (data.clients, data.shape, data.classes, data.test) == (("a", "b"), (1,), 6, None)


def test_array_data_errors() -> None:
    with pytest.raises(DataError, match="client 'b' has no examples to train on; leave it out"):
        ArrayData(torch.zeros(2, 1), torch.zeros(2), {"a": (0, 2, 2), "b": (2, 2, 2)})
    data = ArrayData(torch.zeros(2, 1), torch.zeros(2), {"a": (0, 2, 2)})
    with pytest.raises(DataError, match=r"there is no client 'x' among 1 \('a' to 'a'\); see data.clients"):
        data.shard("x")


def test_array_data_crosses_to_another_process() -> None:
    data = ArrayData(torch.arange(6.0)[:, None], torch.arange(6), {"a": (0, 2, 3), "b": (3, 6, 6)})
    assert data.clients == ("a", "b")

    copy = pickle.loads(pickle.dumps(data))
    assert copy.clients == data.clients
    for client in data.clients:
        assert copy.shard(client).x.tolist() == data.shard(client).x.tolist()
        assert copy.shard(client).y.tolist() == data.shard(client).y.tolist()
    assert copy.shard("a").held_out.y.tolist() == [2]


def test_numbered_is_a_sequence_that_holds_nothing() -> None:
    population = Numbered(1_000_000)

    assert len(population) == 1_000_000
    assert (population[3], population[-1], population[2:4]) == ("3", "999999", ["2", "3"])
    assert "999999" in population
    assert not any(name in population for name in ("1000000", "-1", "01", "x", "", "٣", "9" * 5000, 3))
    assert list(Numbered(3)) == ["0", "1", "2"]
    with pytest.raises(IndexError):
        population[1_000_000]


def test_lazy_data_makes_only_what_is_asked_for() -> None:
    asked: list[str] = []

    def make(client: str) -> Shard:
        asked.append(client)
        return Shard(torch.full((2, 3), float(client)), torch.zeros(2))

    data = LazyData(Numbered(1_000_000), make, classes=2)
    assert data.shard("77").x[0, 0] == 77
    assert (data.shape, data.classes, data.test, len(data.clients)) == ((3,), 2, None, 1_000_000)
    assert asked == ["77", "0"]
    assert LazyData(["a"], make, shape=(3,)).shape == (3,)


def test_lazy_data_errors() -> None:
    data = LazyData(["a", "b"], lambda client: Shard(torch.zeros(0, 1), torch.zeros(0)))

    with pytest.raises(DataError, match="there is no client 'c' among 2"):
        data.shard("c")
    with pytest.raises(DataError, match="client 'a' has no examples"):
        data.shard("a")


def test_public_names_are_sorted() -> None:
    assert federated.__all__ == sorted(federated.__all__)
    assert all(hasattr(federated, name) for name in federated.__all__)
