"""Processes that play ClientApps, beside what test_faults and test_lending say of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

HERALD = """
import sys
from contextlib import closing
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from shoal.flower.app import GivenApp
from shoal.flower.compat import context, identify, name_message
from shoal.flower.workers import Workers
from shoal.flower.turns import Turn

app = ClientApp()

@app.query()
def query(message, context):
    import os, sys
    found = ConfigRecord({"has": "torch" in sys.modules, "process": os.getpid()})
    return Message(RecordDict({"c": found}), reply_to=message)

def ask(stage):
    message = Message(RecordDict(), 2, "query")
    name_message(message, "1")
    turn = Turn(message.metadata, context(1, 2, {}, {}), 0)
    found = stage.submit(turn, stage.publish(message.content)).result(60).reply.content["c"]
    return found["has"], found["process"]

identify(1)
with closing(Workers(GivenApp(None, app), 1, 1)) as used, closing(Workers(GivenApp(None, app), 1, 2)) as stage:
    used.ready(), stage.ready()
    has, process = ask(used)
    assert not has
    import torch
    assert ask(stage)[0] and ask(stage)[0]
    assert ask(used) == (False, process)  # what it may remember of its turns is worth more
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "shoal.flower.workers"]
"""


@pytest.mark.slow
def test_processes_have_pytorch_when_this_one_has_it() -> None:
    done = subprocess.run([sys.executable, "-c", HERALD], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
