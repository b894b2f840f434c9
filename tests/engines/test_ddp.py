"""DDP in the Trainer: two processes give the numbers of one, checkpoints resume, and a dead rank ends the job."""

import pytest
from engine_helpers import EVERY_SETTING, SETTINGS, STOCK, a_run, check_resumed, check_same_numbers, resumed
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
def ddp(launches, alone, killed):
    runs = [a_run(name, "ddp", 2) for name in SETTINGS]
    for name in SETTINGS:
        run = a_run(name, "ddp", 2)
        runs.append(resumed(run, launches.checkpoint("ddp", name)))
        runs.append(resumed(run, launches.checkpoint("alone", name), "grown"))
    runs += [a_run(name.removesuffix(" Trainer"), "ddp", 2, label=name, trainer="Trainer") for name in STOCK]
    died = launches.checkpoint("killed", "mars_adamw approx")
    runs.append(a_run("mars_adamw approx", "ddp", 2, label="after the death", resume=died))
    return launches.together("ddp", "ddp", 2, runs)


@EVERY_SETTING
def test_ddp_equals_one_process(name, ddp, alone):
    """With gradient accumulation under no_sync and unequal numbers of labels on the ranks; float32."""
    check_same_numbers(ddp[name], alone[name])
    assert ddp[name]["state_keys"][0] == ddp[name]["state_keys"][1]


@pytest.mark.parametrize("name", STOCK)
def test_ddp_with_the_stock_trainer(name, ddp):
    check_same_numbers(ddp[name], ddp[name.removesuffix(" Trainer")], tolerance=0)


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
