"""On several processes the step takes the clip along, with the bits of gradients multiplied by the factor first."""

import functools
import json

import pytest
from clipping_worker import CASES
from launch_helpers import launch

from hf_mars.optim.kernels import cpu

pytestmark = pytest.mark.slow

PROCESSES = {"ddp": 2, "ddp_bucket_view": 2, "fsdp2": 2, "hsdp": 4}
TRAINERS = pytest.mark.parametrize("engine", ["ddp", "fsdp2"])


@functools.cache
def results(processes):
    names = [name for name in PROCESSES if PROCESSES[name] == processes]
    names += ["MarsTrainer ddp", "MarsTrainer fsdp2"] * (processes == 2)
    return json.loads(launch(processes, "engines/clipping_worker.py", *names).strip().splitlines()[-1])


@pytest.mark.parametrize("engine", PROCESSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_bits_and_one_norm(engine, case):
    method, _, dtype = case
    (same, factors, error, execution), *others = results(PROCESSES[engine])[f"{engine} {case}"]
    assert same and len(others) == PROCESSES[engine] - 1 and all(other[0] for other in others)
    assert all(other[1] == factors for other in others) and 1.0 in factors and min(factors) < 0.9
    assert error < (1e-5 if dtype == "float32" else 0.05)  # of bfloat16, the gradients that ranks average
    if cpu.is_compiled() and method != "mars_shampoo" and dtype == "float32":
        assert execution == "the compiled step"


def of_trainers(engine, run):
    return results(2)[f"MarsTrainer {engine} {run}"]


@TRAINERS
def test_mars_trainer_takes_the_clip_along(engine):
    fused, first = (of_trainers(engine, run) for run in ("fused", "first"))
    for (reasons, losses, norms, weights), (first_reasons, first_losses, first_norms, first_weights) in zip(
        fused, first, strict=True
    ):
        assert reasons == [] and first_reasons == ["fuse_clip=False"]
        assert len(norms) == 4 and max(norms) > 0.5  # where the clip begins
        assert norms == pytest.approx(first_norms, rel=1e-5) and losses == pytest.approx(first_losses, rel=1e-5)
        assert weights == pytest.approx(first_weights, rel=1e-3, abs=1e-4)
    assert fused[0][2] == fused[1][2]
    if engine == "ddp":
        assert fused[0][3] == fused[1][3]


@TRAINERS
def test_a_callback_of_one_process_is_known_to_all(engine):
    said = of_trainers(engine, "a callback on rank 1")
    reason = "Looks.on_pre_optimizer_step may look at clipped gradients"
    assert [reasons for reasons, *_ in said] == [[reason]] * 2
    assert said == [[[reason], *rest] for _, *rest in of_trainers(engine, "first")]  # bit for bit


@TRAINERS
def test_one_that_is_added_during_training_is_an_error(engine):
    for message in of_trainers(engine, "a callback during training"):
        assert "since training began" in message and "fuse_clip=False" in message
