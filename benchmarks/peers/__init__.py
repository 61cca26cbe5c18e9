"""Other frameworks doing the same work, each in an environment of its own: only numpy and its packages are there."""
