"""SIGTERM, SIGINT and SIGUSR1 end a run after a whole checkpoint, and it goes on bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import assert_equal
from launch_helpers import PYTHONPATH, TESTS
from trainer_helpers import EXACT, losses, make_trainer, train, weights
from transformers import TrainerCallback

from hf_mars.trainer.checkpoints import fault
from hf_mars.trainer.signals import SIGNALS, TrainingStopped


class Kill(TrainerCallback):
    """Sends signals to this process in the middle of an update."""

    def __init__(self, step, *signals):
        self.step, self.signals = step, signals

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for signum in self.signals:
                os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
@pytest.mark.parametrize("optim_args", ["gamma=0.3", EXACT], ids=["approx", "exact"])
def test_a_run_that_a_signal_has_stopped_goes_on_bit_for_bit(tmp_path, signum, optim_args):
    settings = {"optim_args": optim_args, "gradient_accumulation_steps": 2, "max_steps": 5}
    whole = train(tmp_path / "whole", **settings)
    handlers = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(TrainingStopped) as stopped:
        # The signal of a launcher follows that of a scheduler at once.
        train(tmp_path / "run", callbacks=[Kill(2, signum, signum)], **settings)
    assert stopped.value.code == 128 + signum
    assert stopped.value.checkpoint == tmp_path / "run" / "checkpoint-3"
    assert fault(stopped.value.checkpoint) is None
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    resumed = train(tmp_path / "run", resume=True, **settings)
    assert losses(resumed) == losses(whole)
    assert_equal(weights(resumed), weights(whole))


def test_an_evaluation_that_is_due_does_not_come_before_the_save(tmp_path, caplog):
    trainer = make_trainer(tmp_path, callbacks=[Kill(2, signal.SIGTERM)], eval_strategy="steps", eval_steps=3)
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert not [row for row in trainer.state.log_history if "eval_loss" in row]


def test_a_handler_of_the_user_s_own_stays(tmp_path):
    received = []
    previous = signal.signal(signal.SIGUSR1, lambda *args: received.append(args[0]))
    try:
        trainer = train(tmp_path, callbacks=[Kill(2, signal.SIGUSR1)])
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert received == [signal.SIGUSR1] and trainer.state.global_step == 6


SCRIPT = """
import os, signal, sys, time
from trainer_helpers import make_trainer
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        print("in a step", flush=True)
        time.sleep(60)

make_trainer(sys.argv[1], callbacks=[Slow()]).train()
"""


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        cwd=TESTS,
        stdout=subprocess.PIPE,
    )
    assert b"in a step\n" in iter(process.stdout.readline, b"")
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.stdout.close()
