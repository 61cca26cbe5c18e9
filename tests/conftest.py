"""How torch's threads wait, set before anything imports it, for the processes that tests start too."""

from __future__ import annotations

import os

# By default they spin, even for a model of a few numbers. Tests share their cores with each other and with those
# processes: spinning took four times the processor time of the work itself. No result depends on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
