"""One participant: its data, models and local training."""
