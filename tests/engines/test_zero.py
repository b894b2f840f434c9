"""Loops under DeepSpeed's ZeRO, in many of its settings: several processes give the numbers of one."""

import json

import pytest
from engine_helpers import NEEDS_DEEPSPEED
from launch_helpers import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), NEEDS_DEEPSPEED]

LAUNCHES = {  # processes: cases of zero_worker.py
    2: [
        "no ZeRO",
        "1",
        "1, round robin",
        "1, not contiguous, accumulated",
        "2, no reduce_scatter",
        "2, aligned",
        "2, offload",
        "3",
        "3, small sub-groups, accumulated",
        "3, offload",
    ],
    4: ["2", "2, round robin, overlap, accumulated", "3, small sub-groups, overlap"],
}


@pytest.mark.parametrize("processes", LAUNCHES)
def test_zero_loops_equal_one_process(processes):
    """In float32, which ZeRO keeps its copies of weights in whatever the model's dtype: no float64."""
    printed = launch(processes, "engines/zero_worker.py", *LAUNCHES[processes], timeout=600, DS_ACCELERATOR="cpu")
    errors = json.loads(printed.strip().splitlines()[-1])
    assert list(errors) == LAUNCHES[processes]
    for case, by_method in errors.items():
        for method, error in by_method.items():
            # A gradient's last bit decides how g_{t−1} is rounded to bfloat16, by up to 2**-8 of it.
            assert error < (1e-4 if "bfloat16" in method else 1e-5), (case, method)
