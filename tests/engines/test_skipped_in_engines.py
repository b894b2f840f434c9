"""All processes skip a step whose gradient is not finite in one of them, and no other."""

import functools
import json

import pytest
from launch_helpers import launch
from skipping_worker import BAD, CASES

pytestmark = pytest.mark.slow

ENGINES = ("ddp", "fsdp2", "tensor_parallel")


@functools.cache
def results():
    return json.loads(launch(2, "engines/skipping_worker.py", *ENGINES).strip().splitlines()[-1])


@pytest.mark.parametrize("where", ["", " on the device"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_processes_skip_it(engine, case, where):
    assert results()[f"{engine} {case}{where}"] == [[True, 0, len(BAD)]] * 2
