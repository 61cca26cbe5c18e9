"""Engines on a real Ray cluster: two nodes of one CPU each on this machine, whose nodes and processes are killed."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import ray
import torch
from ray._private import ray_constants
from ray.cluster_utils import Cluster as Nodes
from torch import nn

from shoal import Client, Experiment, FedAvg, LocalTraining, Scaffold, Strategy, Work
from shoal.compose import Composition
from shoal.protos.errors import ExperimentError, RunError
from shoal.protos.messages import Failure
from shoal.server.callbacks import Callback
from shoal.simulations.cluster import Cluster
from shoal.simulations.crew import Died
from shoal.simulations.engine import Assignment, Job, Result
from shoal.simulations.federated import ArrayData
from shoal.simulations.fleet import Engines, SimulatedFleet
from shoal.simulations.pool import Pool
from shoal.simulations.session import NO_SPARE
from shoal.strategies.base import Context

# Ray leaves pipes and processes to the garbage collector.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

HERE = os.getpid()
N = 36  # clients: two whole leaves for two workers, and four single ones
NODE = {"node_ip_address": "127.0.0.1", "include_dashboard": False, "include_log_monitor": False}
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 200, "health_check_failure_threshold": 3}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def data() -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(N * 500, 4, generator=generator), torch.randint(0, 3, (N * 500,), generator=generator)
    return ArrayData(x, y, {str(i): (500 * i, 500 * i + 5, 500 * i + 500) for i in range(N)}, classes=3)


@dataclass(frozen=True)
class Struck(Client):
    """Takes a step. The first one in round 2 says where it is, then waits for what will happen to its process."""

    said: Path
    raises: str = ""

    def fit(self, work: Work) -> None:
        if work.client == self.raises:
            raise ValueError("my data is cursed")
        if work.round == 2 and not self.said.exists():
            whole = self.said.with_suffix(f".{os.getpid()}")
            whole.write_text(f"{os.getpid()} {ray.get_runtime_context().get_node_id()}")
            try:
                os.link(whole, self.said)
            except FileExistsError:
                pass
            else:
                signal.pause()
        loss = nn.functional.cross_entropy(work.model(work.data.x), work.data.y)
        work.step(loss, torch.optim.SGD(work.model.parameters(), lr=0.1))


@dataclass
class Watch(Callback):
    """Keeps failures."""

    failures: list[tuple[int, str, str]] = field(default_factory=list)

    def on_failure(self, failure: Failure) -> None:
        self.failures.append((failure.round, failure.client, failure.reason))


def assignment(strategy: Strategy, client: Client | None = None, make: Callable[[], nn.Module] = model) -> Assignment:
    return Assignment(make, data(), strategy, LocalTraining(lr=0.1), client=client)


def play(
    strategy: Strategy, client: Client, engines: Callable[[Assignment], Engines], **changes: Any
) -> tuple[dict[str, bytes], Watch]:
    """All values that there are at the end, those of clients too."""
    fields: dict[str, Any] = {"rounds": 3, "cohort": N, "quorum": 0.5, "strategy": strategy, "client": client} | changes
    composition, watch = Composition(Experiment(model=model, data=data(), **fields)), Watch()
    with closing(SimulatedFleet(assignment(strategy, client), engines=engines)) as fleet:
        point = composition.coordinator(fleet, composition.start(), [watch]).run()
        values = {**point.state, "buffers": point.carried.buffers, "counters": point.carried.counters}
        for known in fleet.states.clients():
            values |= {f"{known} {name}": value for name, value in (fleet.states.get(known) or {}).items()}
    return {name: torch.as_tensor(value).numpy().tobytes() for name, value in values.items()}, watch


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        gc.collect()


@pytest.fixture(scope="module")
def head() -> Iterator[Nodes]:
    """A cluster's head, without a CPU; on loopback alone, and where no other Ray on this machine looks."""
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        with quiet():
            try:
                nodes = Nodes(
                    initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "_system_config": SOON | NO_SPARE}
                )
            except Exception as error:  # seen once in hundreds of starts; only Ray's own logs can say why
                for log in sorted(Path(folder).glob("**/gcs_server*")):
                    error.add_note(f"{log.name}:\n{log.read_text(errors='replace')[-4000:]}")
                raise
        yield nodes
        with quiet():
            nodes.shutdown()


@pytest.fixture
def nodes(head: Nodes) -> Nodes:
    """Two nodes of one CPU each beside the head."""
    with quiet():
        while len(head.worker_nodes) < 2:
            head.add_node(**NODE, num_cpus=1)
    return head


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What SCAFFOLD comes to in worker processes."""
    said = tmp_path_factory.mktemp("pool") / "said"
    said.touch()
    return play(Scaffold(), Struck(said), lambda a: Pool(a, 2))[0]


@contextmanager
def meanwhile(said: Path, strike: Callable[[int, str], None]) -> Iterator[None]:
    """``strike`` with the process and the node that a client has said to be in."""

    def watch() -> None:
        wait_until(said.exists)
        process, node = said.read_text().split()
        strike(int(process), node)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(process: int) -> bool:
    import psutil  # which Ray brings along

    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_the_bits_of_a_pool_and_its_failures(nodes: Nodes, tmp_path: Path) -> None:
    """More workers are wanted than there is room for: the cluster does what it can."""
    (tmp_path / "said").touch()
    client = Struck(tmp_path / "said", raises="7")
    pool, of_pool = play(FedAvg(), client, lambda a: Pool(a, 2))
    cluster, of_cluster = play(FedAvg(), client, partial(Cluster, workers=3, address=nodes.address))

    assert cluster == pool
    assert of_cluster.failures == of_pool.failures
    assert of_cluster.failures[0] == (1, "7", "client '7' raised ValueError in round 1: my data is cursed")
    assert not ray.is_initialized()


def test_a_process_that_is_killed(nodes: Nodes, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    client = Struck(tmp_path / "said")
    with meanwhile(client.said, lambda process, _: os.kill(process, signal.SIGKILL)):
        bits, watch = play(Scaffold(), client, partial(Cluster, address=nodes.address))

    assert bits == undisturbed
    assert watch.failures == []


def test_a_node_that_is_lost(
    nodes: Nodes, tmp_path: Path, undisturbed: dict[str, bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    client = Struck(tmp_path / "said")

    def lose(process: int, name: str) -> None:
        nodes.remove_node(next(node for node in nodes.worker_nodes if node.node_id == name), allow_graceful=False)

    with meanwhile(client.said, lose):
        bits, watch = play(Scaffold(), client, partial(Cluster, address=nodes.address))

    assert bits == undisturbed
    assert watch.failures == []
    assert capfd.readouterr().out == ""  # where a run's own lines go
    wait_until(lambda: not alive(int(client.said.read_text().split()[0])))


def test_an_actor_that_is_busy_beyond_the_deadline(nodes: Nodes, tmp_path: Path) -> None:
    """It is killed, and another one takes its place."""
    client = Struck(tmp_path / "said")
    point = Composition(Experiment(model=model, data=data(), client=client)).start()
    context = Context(round=2, population=N, asked=2)
    with closing(Cluster(assignment(FedAvg(), client), 1, nodes.address)) as cluster:
        jobs = [Job(i, [(str(i), None)], context, ends=time.monotonic() + 1.0) for i in range(2)]
        late = sorted(cluster.run(jobs, point.state, point.carried), key=lambda done: done[0].position)
        again = list(cluster.run([replace(jobs[0], ends=None)], point.state, point.carried))

    assert late == [(jobs[0], Died("busy beyond the deadline")), (jobs[1], Died("not begun before the deadline"))]
    assert [type(result) for _, result in again] == [Result]
    wait_until(lambda: not alive(int(client.said.read_text().split()[0])))


def test_a_cluster_without_room(nodes: Nodes) -> None:
    """The caller's own connection, through which all CPUs are taken, is used and left alone."""
    with quiet():
        ray.init(nodes.address, log_to_driver=False)
    try:
        taken = [ray.remote(num_cpus=1)(Watch).remote() for _ in range(2)]
        ray.wait([actor.__ray_ready__.remote() for actor in taken], num_returns=2)
        with pytest.raises(RunError, match=r"which has 2 CPUs, had none free for 0\.5 s; free one or add a node"):
            Cluster(assignment(FedAvg()), patience=0.5)
        with pytest.raises(RunError, match=rf"is connected to the Ray cluster at {nodes.address}, not at far:1"):
            Cluster(assignment(FedAvg()), address="far:1")
        assert ray.is_initialized() and ray.cluster_resources()["CPU"] == 2
    finally:
        ray.shutdown()


def test_what_cannot_be_loaded_is_said_at_once(nodes: Nodes) -> None:
    def here_only() -> nn.Module:
        if os.getpid() != HERE:
            raise OSError("no such weights")
        return model()

    with pytest.raises(ExperimentError, match="OSError: no such weights"):
        Cluster(assignment(FedAvg(), make=here_only), 1, nodes.address)


def test_engines_that_die_at_once(nodes: Nodes) -> None:
    def deadly() -> nn.Module:
        if os.getpid() != HERE:
            os._exit(3)
        return model()

    with pytest.raises(RunError, match=r"an actor cannot start on the Ray cluster \(its worker process has died\)"):
        Cluster(assignment(FedAvg(), make=deadly), 1, nodes.address)


def test_alone_on_this_machine(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Nothing listens beyond this machine, and nothing is left behind."""
    import psutil

    (tmp_path / "said").touch()
    started, addresses = set[int](), set[str]()
    before = psutil.Process().children(recursive=True)

    def engines(given: Assignment) -> Cluster:
        cluster = Cluster(given, 1)
        for process in set(psutil.Process().children(recursive=True)).difference(before):
            started.add(process.pid)
            addresses.update(c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN)
        return cluster

    bits, _ = play(Scaffold(), Struck(tmp_path / "said"), engines)

    assert bits == undisturbed
    assert addresses and addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    wait_until(lambda: not any(map(alive, started)))
    assert not ray.is_initialized()
