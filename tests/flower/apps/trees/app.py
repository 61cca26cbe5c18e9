"""XGBoost: each client grows a tree a round, the server gathers them (bagging)."""

import numpy as np
import xgboost
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedXgbBagging

client = ClientApp()
server = ServerApp()
PARAMETERS = {
    "objective": "reg:squarederror",
    "max_depth": 2,
    "eta": 0.3,
    "nthread": 1,
    "base_score": 0.5,
    "tree_method": "exact",
}


def data(partition: int) -> xgboost.DMatrix:
    rng = np.random.default_rng(partition)
    x = rng.normal(size=(30, 3))
    return xgboost.DMatrix(x, label=x[:, 0] ** 2 + partition)


@client.train()
def train(message: Message, context: Context) -> Message:
    before = bytes(message.content["arrays"]["0"].numpy().tobytes())
    partition = int(context.node_config["partition-id"])
    if message.content["config"]["server-round"] == 1:
        booster = xgboost.train(PARAMETERS, data(partition), num_boost_round=1)
    else:
        booster = xgboost.Booster(params=PARAMETERS)
        booster.load_model(bytearray(before))
        booster.update(data(partition), booster.num_boosted_rounds())
        booster = booster[booster.num_boosted_rounds() - 1 :]
    model = np.frombuffer(booster.save_raw("json"), dtype=np.uint8)
    metrics = MetricRecord({"num-examples": 30})
    return Message(RecordDict({"arrays": ArrayRecord([model]), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedXgbBagging(fraction_evaluate=0.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord([np.frombuffer(b"", dtype=np.uint8)]),
        num_rounds=2,
        train_config=ConfigRecord(),
    )
    if context.run_config["result"]:
        booster = xgboost.Booster(params=PARAMETERS)
        booster.load_model(bytearray(result.arrays["0"].numpy().tobytes()))
        np.savez(str(context.run_config["result"]), booster.predict(data(99)), np.array(booster.num_boosted_rounds()))
