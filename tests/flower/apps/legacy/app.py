"""Linear regression as people wrote it for NumPyClient: client_fn, server_fn, functions for configs and metrics."""

import numpy as np
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvgM
from flwr.serverapp import ServerApp


def data(partition: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(partition)
    x = rng.normal(size=(20 + 5 * partition, 3))
    return x, x @ np.array([1.0, -2.0, 0.5]) + partition


class Linear(NumPyClient):
    def __init__(self, partition: int) -> None:
        self.x, self.y = data(partition)

    def error(self, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return self.x @ weights + bias - self.y

    def fit(self, parameters, config):
        weights, bias = parameters
        for _ in range(int(config["epochs"])):
            error = self.error(weights, bias)
            weights = weights - 0.1 * self.x.T @ error / len(error)
            bias = bias - 0.1 * error.mean()
        return [weights, np.asarray(bias)], len(self.y), {"mse": float((error**2).mean())}

    def evaluate(self, parameters, config):
        error = self.error(*parameters)
        return float((error**2).mean()), len(self.y), {"mae": float(abs(error).mean())}


def client_fn(context: Context):
    return Linear(int(context.node_config["partition-id"])).to_client()


def weighted(metrics):
    total = sum(count for count, _ in metrics)
    names = metrics[0][1]
    return {name: sum(count * found[name] for count, found in metrics) / total for name in names}


def server_fn(context: Context) -> ServerAppComponents:
    def save(round: int, parameters, config):
        if context.run_config["result"]:
            np.savez(str(context.run_config["result"]), *parameters)
        return float(np.linalg.norm(parameters[0])), {"bias": float(parameters[1])}

    strategy = FedAvgM(
        initial_parameters=ndarrays_to_parameters([np.zeros(3), np.zeros(())]),
        server_momentum=0.5,
        on_fit_config_fn=lambda round: {"epochs": 1 + round},
        fit_metrics_aggregation_fn=weighted,
        evaluate_metrics_aggregation_fn=weighted,
        evaluate_fn=save,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(context.run_config["rounds"])))


server = ServerApp(server_fn=server_fn)
client = ClientApp(client_fn=client_fn)
