"""The coordinator: rounds over any fleet, the run folder, checkpoints."""
