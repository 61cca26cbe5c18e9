"""Shoal: federated learning for PyTorch. Simulate many clients, deploy them, compare strategies.

Everything here is imported on first use, so ``import shoal`` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

# gRPC writes about each handshake that fails, in words for its own developers and without an end. It reads this when
# it is imported, by whichever module of Shoal comes first.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

if TYPE_CHECKING:
    from shoal import flower as flower
    from shoal.client.client import Client as Client
    from shoal.client.client import Work as Work
    from shoal.client.local import LocalTraining as LocalTraining
    from shoal.client.lora import lora as lora
    from shoal.comparing import compare as compare
    from shoal.comparison import Comparison as Comparison
    from shoal.experiment import Experiment as Experiment
    from shoal.protos.errors import ShoalError as ShoalError
    from shoal.protos.experiment import Evaluation as Evaluation
    from shoal.run import Run as Run
    from shoal.server.callbacks import BestModel as BestModel
    from shoal.server.callbacks import Callback as Callback
    from shoal.server.callbacks import EarlyStopping as EarlyStopping
    from shoal.server.callbacks import Snapshots as Snapshots
    from shoal.server.callbacks import Stop as Stop
    from shoal.simulate import resume as resume
    from shoal.simulations import datasets as datasets
    from shoal.simulations.label_skew import Continuous as Continuous
    from shoal.simulations.label_skew import Dirichlet as Dirichlet
    from shoal.simulations.label_skew import DirichletMix as DirichletMix
    from shoal.simulations.label_skew import Distribution as Distribution
    from shoal.simulations.label_skew import InnerDirichlet as InnerDirichlet
    from shoal.simulations.label_skew import Pathological as Pathological
    from shoal.simulations.label_skew import PowerLaw as PowerLaw
    from shoal.simulations.label_skew import Shards as Shards
    from shoal.simulations.label_skew import Similarity as Similarity
    from shoal.simulations.partitioners import GroupedNatural as GroupedNatural
    from shoal.simulations.partitioners import Iid as Iid
    from shoal.simulations.partitioners import Natural as Natural
    from shoal.simulations.partitioners import Partitioner as Partitioner
    from shoal.simulations.partitioners import Resampled as Resampled
    from shoal.simulations.quantity_skew import Growing as Growing
    from shoal.simulations.quantity_skew import QuantitySkew as QuantitySkew
    from shoal.simulations.quantity_skew import Sizes as Sizes
    from shoal.strategies.apfl import APFL as APFL
    from shoal.strategies.base import Strategy as Strategy
    from shoal.strategies.ditto import Ditto as Ditto
    from shoal.strategies.fedadagrad import FedAdagrad as FedAdagrad
    from shoal.strategies.fedadam import FedAdam as FedAdam
    from shoal.strategies.fedavg import FedAvg as FedAvg
    from shoal.strategies.fedavgm import FedAvgM as FedAvgM
    from shoal.strategies.fedbabu import FedBABU as FedBABU
    from shoal.strategies.fedbn import FedBN as FedBN
    from shoal.strategies.feddyn import FedDyn as FedDyn
    from shoal.strategies.fedexp import FedExP as FedExP
    from shoal.strategies.fedlc import FedLC as FedLC
    from shoal.strategies.fednova import FedNova as FedNova
    from shoal.strategies.fedper import FedPer as FedPer
    from shoal.strategies.fedprox import FedProx as FedProx
    from shoal.strategies.fedrep import FedRep as FedRep
    from shoal.strategies.fedsam import FedSAM as FedSAM
    from shoal.strategies.fedyogi import FedYogi as FedYogi
    from shoal.strategies.finetune import FineTune as FineTune
    from shoal.strategies.lgfedavg import LgFedAvg as LgFedAvg
    from shoal.strategies.mimelite import MimeLite as MimeLite
    from shoal.strategies.moon import Moon as Moon
    from shoal.strategies.perfedavg import PerFedAvg as PerFedAvg
    from shoal.strategies.pfedme import PFedMe as PFedMe
    from shoal.strategies.scaffold import Scaffold as Scaffold
    from shoal.strategies.selectors import Uniform as Uniform

_HOMES = {
    "APFL": "shoal.strategies.apfl",
    "BestModel": "shoal.server.callbacks",
    "Callback": "shoal.server.callbacks",
    "Client": "shoal.client.client",
    "Comparison": "shoal.comparison",
    "Continuous": "shoal.simulations.label_skew",
    "Dirichlet": "shoal.simulations.label_skew",
    "DirichletMix": "shoal.simulations.label_skew",
    "Distribution": "shoal.simulations.label_skew",
    "Ditto": "shoal.strategies.ditto",
    "EarlyStopping": "shoal.server.callbacks",
    "Evaluation": "shoal.protos.experiment",
    "Experiment": "shoal.experiment",
    "FedAdagrad": "shoal.strategies.fedadagrad",
    "FedAdam": "shoal.strategies.fedadam",
    "FedAvg": "shoal.strategies.fedavg",
    "FedAvgM": "shoal.strategies.fedavgm",
    "FedBABU": "shoal.strategies.fedbabu",
    "FedBN": "shoal.strategies.fedbn",
    "FedDyn": "shoal.strategies.feddyn",
    "FedExP": "shoal.strategies.fedexp",
    "FedLC": "shoal.strategies.fedlc",
    "FedNova": "shoal.strategies.fednova",
    "FedPer": "shoal.strategies.fedper",
    "FedProx": "shoal.strategies.fedprox",
    "FedRep": "shoal.strategies.fedrep",
    "FedSAM": "shoal.strategies.fedsam",
    "FedYogi": "shoal.strategies.fedyogi",
    "FineTune": "shoal.strategies.finetune",
    "GroupedNatural": "shoal.simulations.partitioners",
    "Growing": "shoal.simulations.quantity_skew",
    "Iid": "shoal.simulations.partitioners",
    "InnerDirichlet": "shoal.simulations.label_skew",
    "LgFedAvg": "shoal.strategies.lgfedavg",
    "LocalTraining": "shoal.client.local",
    "MimeLite": "shoal.strategies.mimelite",
    "Moon": "shoal.strategies.moon",
    "Natural": "shoal.simulations.partitioners",
    "PFedMe": "shoal.strategies.pfedme",
    "Partitioner": "shoal.simulations.partitioners",
    "Pathological": "shoal.simulations.label_skew",
    "PerFedAvg": "shoal.strategies.perfedavg",
    "PowerLaw": "shoal.simulations.label_skew",
    "QuantitySkew": "shoal.simulations.quantity_skew",
    "Resampled": "shoal.simulations.partitioners",
    "Run": "shoal.run",
    "Scaffold": "shoal.strategies.scaffold",
    "Shards": "shoal.simulations.label_skew",
    "ShoalError": "shoal.protos.errors",
    "Similarity": "shoal.simulations.label_skew",
    "Sizes": "shoal.simulations.quantity_skew",
    "Snapshots": "shoal.server.callbacks",
    "Stop": "shoal.server.callbacks",
    "Strategy": "shoal.strategies.base",
    "Uniform": "shoal.strategies.selectors",
    "Work": "shoal.client.client",
    "compare": "shoal.comparing",
    "lora": "shoal.client.lora",
    "resume": "shoal.simulate",
}

__all__ = [
    "APFL",
    "BestModel",
    "Callback",
    "Client",
    "Comparison",
    "Continuous",
    "Dirichlet",
    "DirichletMix",
    "Distribution",
    "Ditto",
    "EarlyStopping",
    "Evaluation",
    "Experiment",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedBABU",
    "FedBN",
    "FedDyn",
    "FedExP",
    "FedLC",
    "FedNova",
    "FedPer",
    "FedProx",
    "FedRep",
    "FedSAM",
    "FedYogi",
    "FineTune",
    "GroupedNatural",
    "Growing",
    "Iid",
    "InnerDirichlet",
    "LgFedAvg",
    "LocalTraining",
    "MimeLite",
    "Moon",
    "Natural",
    "PFedMe",
    "Partitioner",
    "Pathological",
    "PerFedAvg",
    "PowerLaw",
    "QuantitySkew",
    "Resampled",
    "Run",
    "Scaffold",
    "Shards",
    "ShoalError",
    "Similarity",
    "Sizes",
    "Snapshots",
    "Stop",
    "Strategy",
    "Uniform",
    "Work",
    "compare",
    "datasets",
    "flower",
    "lora",
    "resume",
]


def __getattr__(name: str) -> object:
    if name == "datasets":
        return import_module("shoal.simulations.datasets")
    if name == "flower":
        return import_module("shoal.flower")
    if name == "__version__":
        return version("shoal")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
