"""Several processes give the numbers of one, in plain loops: each rank sees its part of every batch."""

import functools
import json

import pytest
from distributed_worker import OPTIONS
from helpers import EVERY_METHOD
from launch_helpers import launch

pytestmark = pytest.mark.slow

PROCESSES = {
    "ddp": 2,
    "ddp_bucket_view": 2,
    "ddp_no_sync": 2,
    "fsdp2": 2,
    "fsdp2_accelerate": 2,
    "tensor_parallel": 2,
    "hsdp": 4,
    "fsdp2_tensor_parallel": 4,
}


@functools.cache
def results(processes):
    """Of all engines that take this number of processes, in one launch: starting Python costs more than training."""
    engines = [engine for engine, wanted in {**PROCESSES, "fsdp1": 2}.items() if wanted == processes]
    return json.loads(launch(processes, "engines/distributed_worker.py", processes, *engines).strip().splitlines()[-1])


@pytest.mark.parametrize("engine", PROCESSES)
@EVERY_METHOD
@pytest.mark.parametrize("option", OPTIONS)
def test_several_processes_equal_one(engine, method, option):
    """float64, clipping active on some steps, an evaluation before every update, resumed in the middle. Sums over
    shards are ordered otherwise than on one process; Newton-Schulz multiplies such a rounding by up to 500, sign() is
    a matter of luck only within 1e-16 of zero."""
    assert results(PROCESSES[engine])[engine][f"{method} {option}"] < 1e-10


@EVERY_METHOD
@pytest.mark.parametrize("option", OPTIONS)
def test_fsdp1_is_refused(method, option):
    for use_orig_params in (False, True):
        message = results(2)["fsdp1"][f"{method} {option} {use_orig_params}"]
        assert "FSDP1 has flattened a parameter" in message and "fsdp_version: 2" in message
