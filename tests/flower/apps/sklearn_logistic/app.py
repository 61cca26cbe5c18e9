"""scikit-learn's logistic regression, its coefficients averaged."""

import warnings

import numpy as np
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp
from sklearn.linear_model import LogisticRegression


class Logistic(NumPyClient):
    def __init__(self, partition: int) -> None:
        rng = np.random.default_rng(10 + partition)
        self.x = rng.normal(size=(40, 3)) + 0.2 * partition
        self.y = (self.x @ np.array([1.0, 1.0, -1.0]) > 0).astype(int)
        self.model = LogisticRegression(max_iter=3, warm_start=True)
        self.model.classes_ = np.array([0, 1])

    def fit(self, parameters, config):
        self.model.coef_, self.model.intercept_ = parameters
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            self.model.fit(self.x, self.y)
        return [self.model.coef_, self.model.intercept_], len(self.y), {}

    def evaluate(self, parameters, config):
        self.model.coef_, self.model.intercept_ = parameters
        wrong = float((self.model.predict(self.x) != self.y).mean())
        return wrong, len(self.y), {}


def server_fn(context: Context) -> ServerAppComponents:
    def save(round, parameters, config):
        if context.run_config["result"]:
            np.savez(str(context.run_config["result"]), *parameters)

    initial = ndarrays_to_parameters([np.zeros((1, 3)), np.zeros(1)])
    strategy = FedAvg(initial_parameters=initial, evaluate_fn=save)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=3))


server = ServerApp(server_fn=server_fn)
client = ClientApp(client_fn=lambda context: Logistic(int(context.node_config["partition-id"])).to_client())
