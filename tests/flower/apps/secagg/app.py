"""Secure aggregation: the server sees sums of masked vectors only. Its workflow sends several messages a round."""

import numpy as np
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp


class Shifting(NumPyClient):
    def __init__(self, partition: int) -> None:
        self.partition = partition

    def fit(self, parameters, config):
        return [parameters[0] + self.partition], 10 * (1 + self.partition), {}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 1, {}


client = ClientApp(
    client_fn=lambda context: Shifting(int(context.node_config["partition-id"])).to_client(), mods=[secaggplus_mod]
)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(initial_parameters=ndarrays_to_parameters([np.zeros(3)]), fraction_evaluate=0.5)
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=2), strategy=strategy)
    fit = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.5, clipping_range=16.0)
    DefaultWorkflow(fit_workflow=fit)(grid, legacy)
    if context.run_config["result"]:
        record = legacy.state.array_records["parameters"]
        np.savez(str(context.run_config["result"]), *record.to_numpy_ndarrays())
