"""FedAvg, with a look at the clock at each round's end. Cohorts are everybody, or drawn; sums have one order."""

import time
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class InOrder(FedAvg):
    """So that single precision rounds alike, in whichever order replies come."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        return super().aggregate_train(server_round, sorted(replies, key=partition))


def partition(reply: Message) -> int:
    return -1 if reply.has_error() else int(reply.content["metrics"]["partition"])


def initial(config: dict) -> ArrayRecord:
    if config["model"] == "2nn":
        from speed.net import model

        return ArrayRecord(model(0).state_dict())
    return ArrayRecord({"w": Array(np.zeros(int(config["size"])))})


@app.main()
def main(grid: Grid, context: Context) -> None:
    config, ends = context.run_config, []
    nodes, asked = int(config["nodes"]), int(config["asked"])
    part = 0.5 * asked / nodes  # FedAvg rounds it down: the least number is what decides
    strategy = InOrder(
        fraction_train=part,
        fraction_evaluate=part if config["evaluate"] else 0.0,
        min_available_nodes=nodes,
        min_train_nodes=asked,
        min_evaluate_nodes=asked,
    )

    def look(round: int, arrays: ArrayRecord) -> None:
        ends.append(time.monotonic())  # of the whole machine

    result = strategy.start(
        grid=grid,
        initial_arrays=initial(config),
        num_rounds=int(config["rounds"]),
        train_config=ConfigRecord(),
        evaluate_fn=look,
    )
    arrays = {name: array.numpy() for name, array in result.arrays.items()}
    np.savez(str(config["result"]), **arrays, ends=np.array(ends))
