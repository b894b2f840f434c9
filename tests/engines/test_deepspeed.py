"""DeepSpeed's ZeRO in the Trainer: two processes give the numbers of one, and checkpoints resume."""

import pytest
from engine_helpers import (
    APPROX,
    ZERO,
    a_run,
    asked,
    check_resumed,
    check_same_numbers,
    each,
    finished,
    resumed,
)
from launch_helpers import NEEDS_DEEPSPEED, start

# One fixture starts up to four launches, each with a timeout of its own.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


RESUMED = [name for name in APPROX if name.endswith("approx")]
LORA = "mars_m approx"


@pytest.fixture(scope="module")
def alone(request, launches):
    """Of the settings that DeepSpeed takes."""
    return {name: launches.alone(name) for name in asked(request, APPROX)}


@pytest.fixture(scope="module")
def deepspeed(request, launches, alone):
    """A launch per stage."""
    results = {}
    for zero in asked(request, ZERO, "zero"):
        runs = []
        for name in alone:
            run = a_run(name, "deepspeed", 2, label=f"{name} {zero}", zero=zero)
            runs.append(run)
            if name in RESUMED:
                runs.append(resumed(run, launches.checkpoint(zero, run["name"])))
            if name == LORA:
                with_lora = {**a_run(name, "deepspeed", 2, label=f"LoRA {zero}", zero=zero), "lora": True}
                runs.append(with_lora)
                runs.append({**resumed(with_lora, launches.checkpoint(zero, with_lora["name"])), "lora": True})
            if name == APPROX[0]:
                runs.append(finished(run, launches.checkpoint(zero, run["name"], 6)))
            if zero == "stage 2":
                runs.append(a_run(name, "deepspeed", 2, label=f"{name} Trainer", zero=zero, trainer="Trainer"))
        results.update(launches.together(zero, "deepspeed", 2, runs, DS_ACCELERATOR="cpu"))
    return results


@pytest.fixture(scope="module")
def alone_with_lora(launches):
    return launches.alone(LORA, lora=True)


EVERY_APPROX = each(APPROX)
# Stage 1 is the same code of DeepSpeed's as stage 2.
STAGES = {zero: () if zero != "stage 1" else pytest.mark.exhaustive for zero in ZERO}
EVERY_STAGE = pytest.mark.parametrize("zero", [pytest.param(zero, marks=marks) for zero, marks in STAGES.items()])


@NEEDS_DEEPSPEED
@EVERY_APPROX
@EVERY_STAGE
def test_zero_equals_one_process(name, zero, deepspeed, alone):
    """Flat slices of groups, which the groups' kinds tell apart; in stage 3 the model is made in shards."""
    check_same_numbers(deepspeed[f"{name} {zero}"], alone[name])
    keys = deepspeed[f"{name} {zero}"]["state_keys"]
    assert keys[0] == keys[1] and all(keys[0])


@NEEDS_DEEPSPEED
@EVERY_STAGE
def test_zero_with_lora_equals_one_process(zero, deepspeed, alone_with_lora):
    """All but the adapters is frozen."""
    check_same_numbers(deepspeed[f"LoRA {zero}"], alone_with_lora)
    check_resumed(deepspeed[f"LoRA {zero} resumed"], deepspeed[f"LoRA {zero}"], tolerance=0)


@pytest.mark.exhaustive
@NEEDS_DEEPSPEED
@EVERY_STAGE
def test_zero_refuses_checkpoints_of_another_number_of_processes(zero, launches, deepspeed):
    """As it does itself, with a traceback."""
    run = a_run(LORA, "deepspeed", 2, label=f"of one {zero}", zero=zero)
    checkpoint = launches.checkpoint(zero, f"{LORA} {zero}")
    path, _ = launches.plan(f"of one {zero}", "deepspeed", 1, [resumed(run, checkpoint)])
    done = start(1, "engines/engine_worker.py", path, DS_ACCELERATOR="cpu")
    assert done.returncode != 0
    assert "was saved by 2 processes under ZeRO, but this run has 1" in done.stderr


@NEEDS_DEEPSPEED
@each(RESUMED)
@EVERY_STAGE
def test_zero_resumes(name, zero, deepspeed):
    check_resumed(deepspeed[f"{name} {zero} resumed"], deepspeed[f"{name} {zero}"], tolerance=0)


@NEEDS_DEEPSPEED
@EVERY_STAGE
def test_zero_leaves_a_finished_run_as_it_is(zero, deepspeed):
    run = f"{APPROX[0]} {zero}"
    check_same_numbers(deepspeed[f"{run} finished"], deepspeed[run], tolerance=0, steps=0)


@NEEDS_DEEPSPEED
@EVERY_APPROX
@pytest.mark.parametrize("zero", ["stage 2"])
def test_zero_with_the_stock_trainer(name, zero, deepspeed):
    check_same_numbers(deepspeed[f"{name} Trainer"], deepspeed[f"{name} {zero}"], tolerance=0)
