"""A whole machine of a Ray cluster is lost under an app."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import ray
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from ray.cluster_utils import Cluster as Nodes

from shoal.flower import run
from shoal.flower.keep import read_arrays
from tests.flower.test_faults import without
from tests.simulations.test_cluster import head, meanwhile, nodes  # noqa: F401  (fixtures)

# Ray leaves pipes and processes to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.timeout(300),
]


def apps(said: Path) -> tuple[ServerApp, ClientApp]:
    """Client 1 says in round 2 where it is, and then waits for what will happen to its machine."""
    server, client = ServerApp(), ClientApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0)
        strategy.start(grid=grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(2))}), num_rounds=3)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        partition = int(str(context.node_config["partition-id"]))
        if partition == 1 and message.content.config_records["config"]["server-round"] == 2:
            whole = said.with_suffix(".whole")
            whole.write_text(f"{os.getpid()} {ray.get_runtime_context().get_node_id()}")
            whole.rename(said)
            signal.pause()
        w = 0.5 * message.content.array_records["arrays"]["w"].numpy() + partition
        content = RecordDict(
            {"arrays": ArrayRecord({"w": Array(w)}), "m": MetricRecord({"num-examples": 1 + partition})}
        )
        return Message(content, reply_to=message)

    return server, client


def test_the_run_goes_on_without_its_client(nodes: Nodes, tmp_path: Path) -> None:  # noqa: F811
    said = tmp_path / "said"

    def lose(process: int, name: str) -> None:
        nodes.remove_node(next(node for node in nodes.worker_nodes if node.node_id == name), allow_graceful=False)

    with meanwhile(said, lose):
        done = run(apps(said), nodes=4, engine="ray", ray_address=nodes.address, out=tmp_path / "runs", progress="none")

    assert done.status == "finished"
    assert list(done.metrics.counted) == [4, 3, 4] and list(done.metrics.failed) == [0, 1, 0]
    assert list(done.failures["round"]) == [2] and list(done.failures.client) == ["1"]
    assert done.failures.reason.str.contains("its process was lost").all()
    np.testing.assert_allclose(read_arrays(done.path)["w"], without(1, [2]), rtol=1e-12)
