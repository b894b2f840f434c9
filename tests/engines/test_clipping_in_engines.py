"""On several processes the step takes the clip along, with the bits of gradients multiplied by the factor first."""

import functools
import json

import pytest
from clipping_worker import CASES
from launch_helpers import launch

from hf_mars.optim.kernels import cpu

pytestmark = pytest.mark.slow

ENGINES = ("ddp", "ddp_bucket_view", "fsdp2")


@functools.cache
def results():
    return json.loads(launch(2, "engines/clipping_worker.py", *ENGINES).strip().splitlines()[-1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_and_one_norm(engine, case):
    method, _, dtype = case
    (same, factors, error, execution), other = results()[f"{engine} {case}"]
    assert same and other[0]
    assert factors == other[1] and 1.0 in factors and min(factors) < 0.9
    assert error < (1e-5 if dtype == "float32" else 0.05)  # of bfloat16, the gradients that ranks average
    if cpu.is_compiled() and method != "mars_shampoo" and dtype == "float32":
        assert execution == "the compiled step"
