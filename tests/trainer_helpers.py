"""What the tests of the Trainer share: a tiny model with dropout, a random data set, a run, watchers of one."""

import random

import torch
from helpers import tiny_gpt2
from transformers import Trainer, TrainerCallback

from hf_mars import MarsTrainer, MarsTrainingArguments

BLOCK = 12
EXACT = "exact=true,gamma=0.3"
# In exact mode nothing divides the update by r, and lr_1d is the learning rate of make_trainer(): the same first step.
APPROX = "gamma=0.3,adjust_lr_fn=original,lr_1d=1e-2"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def token_blocks(n=32, seed=0):
    """Random token blocks of unequal numbers of valid labels, so that num_items_in_batch differs between batches."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for i in range(n):
        input_ids = torch.randint(1, 32, (BLOCK,), generator=generator)
        labels = input_ids.clone()
        labels[: i % 5] = -100
        blocks.append({"input_ids": input_ids, "labels": labels})
    return blocks


def make_trainer(output_dir, cls=MarsTrainer, *, model=None, train_dataset=None, callbacks=None, **settings):
    defaults = {
        "optim": "mars_adamw",
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = MarsTrainingArguments(output_dir=str(output_dir), **{**defaults, **settings})
    model = tiny_gpt2() if model is None else model
    train_dataset = token_blocks() if train_dataset is None else train_dataset
    return cls(
        model=model, args=args, train_dataset=train_dataset, eval_dataset=token_blocks(8, 1), callbacks=callbacks
    )


def train(output_dir, cls=MarsTrainer, resume=None, **settings):
    """Train from the same start and return the trainer."""
    trainer = make_trainer(output_dir, cls, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class CountSteps(TrainerCallback):
    """How many updates were made in this process: a resumed run has made fewer than its state says."""

    taken = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.taken += 1


class Recorder(TrainerCallback):
    """The learning rate of every step, and a random number drawn after it and at the end."""

    def __init__(self):
        self.lrs, self.drawn = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.lrs.append([group["lr"] for group in optimizer.param_groups])

    def on_train_end(self, args, state, control, **kwargs):
        self.drawn += [torch.rand(3).tolist(), random.random()]


class Batches(MarsTrainer):
    """Keeps the micro-batches of every update, and the state of the random numbers when the first one begins."""

    def __init__(self, *args, **kwargs):
        self.updates, self.random_state = [], None
        super().__init__(*args, **kwargs)

    def training_step(self, *args):
        if self.random_state is None:
            self.random_state = torch.get_rng_state()
        return super().training_step(*args)

    def get_batch_samples(self, *args):
        batches, num_items_in_batch = super().get_batch_samples(*args)
        self.updates.append((batches, num_items_in_batch))
        return batches, num_items_in_batch


class Losses(MarsTrainer):
    """Keeps the loss of every evaluation in training, in order, at x_{t−1} and x_t."""

    def __init__(self, *args, **kwargs):
        self.evaluated = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        if model.training:
            self.evaluated.append(loss.detach().clone())
        return loss


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def weights(trainer):
    return [p.detach() for p in trainer.model.parameters()]


def optimizer_of(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


__all__ = [
    "APPROX",
    "BLOCK",
    "EXACT",
    "NO_DROPOUT",
    "Batches",
    "CountSteps",
    "Losses",
    "MarsTrainer",
    "Recorder",
    "Trainer",
    "losses",
    "make_trainer",
    "optimizer_of",
    "token_blocks",
    "train",
    "weights",
]
