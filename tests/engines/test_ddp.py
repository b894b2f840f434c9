"""DDP in the Trainer: two processes give the numbers of one, checkpoints resume, and a dead rank ends the job."""

import pytest
from engine_helpers import APPROX, EVERY_SETTING, a_run, asked, check_resumed, check_same_numbers, each, resumed
from launch_helpers import start

# One fixture starts up to four launches, each with a timeout of its own.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def killed(launches):
    """A launch whose second rank dies in the middle of the fifth update."""
    name = "mars_adamw approx"
    path, _ = launches.plan("killed", "ddp", 2, [a_run(name, "ddp", 2, die_at=4)])
    return start(2, "engines/engine_worker.py", path, timeout=100)


@pytest.fixture(scope="module")
def ddp(request, launches, alone, killed):
    runs = [a_run(name, "ddp", 2) for name in alone]
    for name in alone:
        run = a_run(name, "ddp", 2)
        runs.append(resumed(run, launches.checkpoint("ddp", name)))
        runs.append(resumed(run, launches.checkpoint("alone", name), "grown"))
    stock = asked(request, APPROX)
    runs += [a_run(name, "ddp", 2, label=f"{name} Trainer", trainer="Trainer") for name in stock]
    died = launches.checkpoint("killed", "mars_adamw approx")
    runs.append(a_run("mars_adamw approx", "ddp", 2, label="after the death", resume=died))
    return launches.together("ddp", "ddp", 2, runs)


@EVERY_SETTING
def test_ddp_equals_one_process(name, ddp, alone):
    """With gradient accumulation under no_sync and unequal numbers of labels on the ranks; float32."""
    check_same_numbers(ddp[name], alone[name])
    assert ddp[name]["state_keys"][0] == ddp[name]["state_keys"][1]


@each(APPROX)
def test_ddp_with_the_stock_trainer(name, ddp):
    check_same_numbers(ddp[f"{name} Trainer"], ddp[name], tolerance=0)


@EVERY_SETTING
def test_ddp_resumes(name, ddp):
    check_resumed(ddp[f"{name} resumed"], ddp[name], tolerance=0)


@EVERY_SETTING
def test_ddp_resumes_on_another_number_of_processes(name, launches, ddp, alone):
    check_resumed(ddp[f"{name} grown"], alone[name])
    shrunk = launches.alone(name, resume=launches.checkpoint("ddp", name))
    check_resumed(shrunk, alone[name])


def test_a_dead_rank_ends_the_job(killed):
    """The fixture's timeout is the test: a job that hangs fails there."""
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stderr


def test_after_a_death_training_resumes(ddp, killed):
    assert killed.returncode != 0
    check_resumed(ddp["after the death"], ddp["mars_adamw approx"], tolerance=0)
