"""Loops under DeepSpeed's ZeRO, in many of its settings: several processes give the numbers of one."""

import json

import pytest
from launch_helpers import NEEDS_DEEPSPEED, launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), NEEDS_DEEPSPEED]


def errors_of(processes, *cases, **environment):
    """Of the cases of zero_worker.py: the largest relative error of a parameter, by case and method."""
    environment["DS_ACCELERATOR"] = "cpu"
    printed = launch(processes, "engines/zero_worker.py", *cases, timeout=900, **environment)
    errors = json.loads(printed.strip().splitlines()[-1])
    assert tuple(errors) == cases
    return errors


def check_zero_loops(processes, *cases, **environment):
    """In float32, which ZeRO keeps its copies of weights in whatever the model's dtype: no float64."""
    for case, by_method in errors_of(processes, *cases, **environment).items():
        for method, error in by_method.items():
            # A gradient's last bit decides how g_{t−1} is rounded to bfloat16, by up to 2**-8 of it.
            assert error < (1e-4 if "bfloat16" in method else 1e-5), (case, method)


def test_zero_loops_equal_one_process():
    check_zero_loops(2, "1", "2", "3, small sub-groups, accumulated")


@pytest.mark.exhaustive
def test_zero_loops_in_triton_kernels_equal_one_process():
    """Slices, some of them empty."""
    check_zero_loops(2, "3, small sub-groups, overlap", TRITON_INTERPRET="1")


@pytest.mark.exhaustive
def test_zero_2_loops_in_triton_kernels_equal_one_process():
    check_zero_loops(2, "2", TRITON_INTERPRET="1")


@pytest.mark.exhaustive
def test_zero_loops_in_every_setting_equal_one_process():
    check_zero_loops(
        2,
        "no ZeRO",
        "1, round robin",
        "1, not contiguous, accumulated",
        "2, no reduce_scatter",
        "2, not contiguous",
        "2, aligned",
        "2, offload",
        "3",
        "3, offload",
        "3, offload_param",
        "3, not contiguous, hpz",
    )


@pytest.mark.exhaustive
def test_zero_loops_on_four_processes_equal_one():
    check_zero_loops(4, "2", "2, round robin, overlap, accumulated", "3, small sub-groups, overlap")


@pytest.mark.exhaustive
def test_steps_that_loss_scaling_skips_leave_no_trace():
    """float16 with a dynamic loss scale: bit for bit the run without the batches that overflow."""
    errors = errors_of(2, "1, fp16", "2, fp16", "3, fp16")
    assert {error for by_method in errors.values() for error in by_method.values()} == {0.0}
