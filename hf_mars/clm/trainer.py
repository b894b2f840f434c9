"""MarsTrainer for runs that may have ended already."""

from typing import Any

from hf_mars import MarsTrainer

from .log import logger


class FinishingTrainer(MarsTrainer):
    """MarsTrainer that takes no step where the checkpoint that it resumes has all of them.

    Trainer asks only after a step whether a run is at its end, so it would train a finished run by one more step each
    time it is resumed. Here everything but the steps is as in any resumed run, under every engine.

    Attributes:
        is_finished: after training has begun, whether there was no step left to take.
    """

    is_finished = False

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        progress = super()._init_training_state(*args, **kwargs)
        self.is_finished = self.state.global_step >= self.state.max_steps
        if self.is_finished:
            logger.info(f"step {self.state.global_step} of {self.state.max_steps}: there is nothing left to train")
        return progress

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.is_finished:
            self.control.should_training_stop = True  # a stream has epochs without end
        else:
            super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not (self.is_finished and "train_loss" in logs):  # the loss of no step would be logged as 0
            super().log(logs, *args, **kwargs)
