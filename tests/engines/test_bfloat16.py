"""bfloat16 in the Trainer: under each engine, MARS's losses leave those of one process no further than AdamW's do."""

import math
import statistics

import pytest
from engine_helpers import DEEPSPEED, ZERO, of_engine
from helpers import NAMES
from launch_helpers import NEEDS_DEEPSPEED
from trainer_helpers import losses, train

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(1200)]

STEPS = 24
SEEDS = range(8)
# With which the losses fall about as far as AdamW's, but for Lion's: a sign says nothing of how near zero it was.
LRS = {"adamw_torch_fused": 5e-3, "mars_adamw": 5e-3, "mars_lion": 5e-4, "mars_shampoo": 1e-2, "mars_m": 5e-3}
ENGINES = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    **{zero: ("deepspeed", {"DS_ACCELERATOR": "cpu"}) for zero in ZERO if "offload" not in zero},
}


def a_bfloat16_run(optim, seed, engine, processes):
    kind = None if engine is None else ENGINES[engine][0]
    settings = {**of_engine(kind, processes), "optim": optim, "bf16": True, "learning_rate": LRS[optim]}
    settings.update(max_steps=STEPS, save_strategy="no", lr_scheduler_type="constant", seed=seed)
    settings.update({} if optim not in NAMES else {"optim_args": "max_norm=1.0"})
    if kind == "deepspeed":
        settings["deepspeed"] = {**DEEPSPEED, **ZERO[engine], "bf16": {"enabled": "auto"}}
    return settings


RUNS = [(optim, seed) for optim in LRS for seed in SEEDS]


@pytest.fixture(scope="module")
def one_process(launches):
    return {
        run: losses(train(launches.folder / f"{run}", model=launches.model(), **a_bfloat16_run(*run, None, 1)))
        for run in RUNS
    }


@pytest.fixture(scope="module", params=ENGINES)
def several_processes(request, launches):
    kind, environment = ENGINES[request.param]
    runs = [{"name": f"{run}", "settings": a_bfloat16_run(*run, request.param, 2)} for run in RUNS]
    return launches.together(f"bfloat16 {request.param}", kind, 2, runs, timeout=900, **environment)


@NEEDS_DEEPSPEED
def test_bfloat16_deviates_no_more_than_adamw(several_processes, one_process):
    """By pairs of the same seed. Roundings are a matter of luck, and so is, among twenty comparisons of eight pairs,
    a difference within three standard errors."""
    deviations = {optim: [] for optim in LRS}
    for run in RUNS:
        actual, expected = several_processes[f"{run}"]["losses"], one_process[run]
        assert len(actual) == len(expected) == STEPS
        deviations[run[0]].append(statistics.fmean(abs(a / e - 1) for a, e in zip(actual, expected, strict=True)))
    for optim in NAMES:
        more = [own - adamw for own, adamw in zip(deviations[optim], deviations["adamw_torch_fused"], strict=True)]
        error = statistics.stdev(more) / math.sqrt(len(SEEDS))
        assert statistics.fmean(more) <= 3 * error, (optim, deviations)
