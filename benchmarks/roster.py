"""Who contends, and how each is started."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch

from benchmarks.measure import Contender
from benchmarks.peers import environments

__all__ = ["CONTENDERS", "ENVIRONMENT", "OURS", "PEERS", "chosen"]

ENGINES = ("lean", "captured", "fused", "auto")


def _here(name: str, cores: int) -> Contender:
    return Contender((sys.executable, "-m", "benchmarks.contenders", name), cores)


def _peer(environment: str, *command: str, cores: int = 1, variables: Mapping[str, str] | None = None) -> Contender:
    return Contender((str(environments.python(environment)), "-m", *command), cores, False, dict(variables or {}))


BLAZEFL = "benchmarks.peers.blazefl_peer"
FEDJAX = "benchmarks.peers.fedjax_peer"
ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
OURS: Mapping[str, Contender] = {
    "plain": _here("plain", 1),
    "floor": _here("floor", 1),
    **{f"shoal-{engine}-{n}": _here(f"shoal-{engine}-{n}", n) for engine in ENGINES for n in (1, 2)},
}
PEERS: Mapping[str, Contender] = {
    "pfl-1": _peer("pfl", "benchmarks.peers.pfl_peer"),
    "pfl-2": _peer("pfl", *TORCHRUN, "benchmarks.peers.pfl_peer", cores=2),
    "blazefl-1": _peer("blazefl", BLAZEFL, "serial", "1"),
    "blazefl-2-threads": _peer("blazefl", BLAZEFL, "threads", "2", cores=2),
    "blazefl-2-processes": replace(_peer("blazefl", BLAZEFL, "processes", "2", cores=2), slow=True),
    "fedjax-1": _peer("fedjax", FEDJAX, "jit", variables=ONE_THREAD),
    "fedjax-2": _peer("fedjax", FEDJAX, "jit", cores=2),
    "fedjax-2-pmap": replace(_peer("fedjax", FEDJAX, "pmap", cores=2, variables=TWO_DEVICES), slow=True),
    "fedjax-new-1": _peer("fedjax-new", FEDJAX, "jit", variables=ONE_THREAD),
    "fedjax-new-2": _peer("fedjax-new", FEDJAX, "jit", cores=2),
}
CONTENDERS: Mapping[str, Contender] = {**OURS, "flwr": replace(_here("flwr", 2), ours=False, slow=True), **PEERS}
ENVIRONMENT = {name: max((e for e in environments.NAMES if name.startswith(e)), key=len) for name in PEERS}


def chosen(wanted: Sequence[str], without: Sequence[str]) -> list[str]:
    """Those that match one of the patterns ``wanted`` and none of ``without``; always the plain loop, first."""
    fits = [name for name in CONTENDERS if any(fnmatch(name, pattern) for pattern in wanted)]
    left = [name for name in fits if not any(fnmatch(name, pattern) for pattern in without)]
    return ["plain", *(name for name in left if name != "plain")]
