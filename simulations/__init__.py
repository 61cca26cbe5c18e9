"""Virtual clients: data sets, partitioners, the engine, worker processes."""
