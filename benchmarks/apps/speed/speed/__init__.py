"""A Flower app whose rounds are timed: a vector that NumPy computes with, or a small net that PyTorch trains."""
