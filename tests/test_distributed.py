"""Several processes give the numbers of one, in plain loops: each rank sees its part of every batch."""

import functools
import json

import pytest
from launch_helpers import launch

PROCESSES = {"ddp": 2, "ddp_bucket_view": 2, "fsdp2": 2, "tensor_parallel": 2, "hsdp": 4, "fsdp2_tensor_parallel": 4}


@functools.cache
def results(processes):
    """Of all engines that take this number of processes, in one launch: starting Python costs more than training."""
    engines = [engine for engine, wanted in {**PROCESSES, "fsdp1": 2}.items() if wanted == processes]
    return json.loads(launch(processes, "distributed_worker.py", processes, *engines).strip().splitlines()[-1])


@pytest.mark.parametrize("engine", PROCESSES)
def test_several_processes_equal_one(engine):
    """float64, clipping active on some steps; four variants, each clipped, unclipped and exact. Sums over shards are
    ordered otherwise than on one process; Newton-Schulz multiplies such a rounding by up to 500, sign() is a matter of
    luck only within 1e-16 of zero."""
    of_settings = results(PROCESSES[engine])[engine]
    assert len(of_settings) == 12
    assert max(of_settings.values()) < 1e-10, of_settings


def test_fsdp1_is_refused():
    messages = results(2)["fsdp1"]
    assert len(messages) == 8
    for message in messages.values():
        assert "FSDP1 has flattened a parameter" in message and "fsdp_version: 2" in message
