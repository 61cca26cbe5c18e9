"""The faults of ``make chaos``, done to a deployment of Flower."""
