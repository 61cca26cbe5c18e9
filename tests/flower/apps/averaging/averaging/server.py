import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    result = FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord({"w": Array(np.zeros(4))}),
        num_rounds=int(config["num-server-rounds"]),
        train_config=ConfigRecord({"lr": config["lr"]}),
        evaluate_fn=lambda round, arrays: MetricRecord({"norm": float(np.linalg.norm(arrays["w"].numpy()))}),
    )
    if config["result"]:
        np.savez(str(config["result"]), result.arrays["w"].numpy())
