"""The short form of `make chaos`: one run with each kind of disturbance."""

import signal

import pytest

from chaos.chaos import Chaos
from chaos.runs import Moment, Setup, result_of, start, wait
from hf_mars.trainer.checkpoints import checkpoints_in, newest_whole, step_of

APPROX = Setup("mars_adamw", "gamma=0.3", 1)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    return Chaos(0, tmp_path_factory.mktemp("chaos"))


def ends_like_the_undisturbed_one(chaos, setup, folder):
    assert set(wait(start(setup, folder))) == {0}, chaos.log(folder)
    assert result_of(folder) == chaos.baseline(setup)


@pytest.mark.parametrize("name", ["optimizer", "manifest"])  # make chaos has them all
def test_a_kill_in_a_save(chaos, tmp_path, name):
    assert wait(start(APPROX, tmp_path, Moment(name, 3))) == [-9], chaos.log(tmp_path)
    assert newest_whole(tmp_path / "out").checkpoint is not None
    ends_like_the_undisturbed_one(chaos, APPROX, tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("setup", [APPROX, Setup("mars_m", "gamma=0.3,exact=true", 2)], ids=str)
def test_a_signal(chaos, tmp_path, setup, signum):
    """To one process, in step 4; in step 3 where exact mode takes batches twice: two processes agree on the next."""
    codes = wait(start(setup, tmp_path, Moment("micro-batch", 7, signum)))
    assert codes == [128 + signum] * setup.processes, chaos.log(tmp_path)
    newest = newest_whole(tmp_path / "out").checkpoint
    assert step_of(newest) == 4
    ends_like_the_undisturbed_one(chaos, setup, tmp_path)


def test_a_torn_file(chaos, tmp_path):
    assert wait(start(APPROX, tmp_path, Moment("optimizer", 4))) == [-9]
    chaos.tear(APPROX, tmp_path)
    assert checkpoints_in(tmp_path / "out") and not chaos.counts["torn files unnoticed"]
    ends_like_the_undisturbed_one(chaos, APPROX, tmp_path)


def test_a_full_disk(chaos):
    chaos.fill_disk(APPROX, checkpoints=1.5)
    if chaos.counts["full disks not tried (no root)"]:
        pytest.skip("mounting a small file system takes root")
    assert chaos.counts["full disks"] == 1 and not chaos.counts["differences"]
