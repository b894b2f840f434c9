"""Exact MARS in MarsTrainer where a run is not whole: parameters that take no part, refusals, interruptions."""

import contextlib

import pytest
import torch
from helpers import NAMES, assert_equal, tiny_gpt2, values
from torch import nn
from trainer_helpers import (
    EXACT,
    NO_DROPOUT,
    Batches,
    Losses,
    make_trainer,
    optimizer_of,
    token_blocks,
    train,
    weights,
)
from transformers import Trainer, TrainerCallback, set_seed

from hf_mars import MarsTrainer

# --- Parameters without gradient


def test_only_trainable_parameters_are_swapped_and_copied(tmp_path):
    """As in LoRA, where nearly everything is frozen: nothing is kept of it, and nothing is ever written to it."""
    model = tiny_gpt2()
    for name, p in model.named_parameters():
        p.requires_grad_(".c_proj." in name)
    frozen = {name: (p, p._version) for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, (p, _) in frozen.items()}
    trainer = train(tmp_path, optim_args=EXACT, model=model)
    state = optimizer_of(trainer).state
    assert len(state) == len(list(model.parameters())) - len(frozen) == 8
    assert all("last_param" in entries for entries in state.values())
    for name, (p, version) in frozen.items():
        assert p._version == version and torch.equal(p, before[name]) and p.grad is None


def test_parameters_that_take_no_part(tmp_path):
    """A layer that no forward pass reaches, and one that every other update does, with the same masks replayed."""

    class Extra(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.unused, self.sometimes = model, nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids, labels, num_items_in_batch=None):
            loss = self.model(input_ids=input_ids, labels=labels, num_items_in_batch=num_items_in_batch).loss
            if input_ids.sum() % 2:
                loss = loss + self.sometimes.weight.square().mean()
            return {"loss": loss}

    def extra_model():
        return Extra(tiny_gpt2(tie_word_embeddings=False))

    settings = {"optim_args": EXACT, "save_strategy": "steps", "save_steps": 3}
    model = extra_model()
    start = values(model.unused.parameters())
    trainer = train(tmp_path, model=model, **settings)
    assert_equal(values(model.unused.parameters()), start)
    state = optimizer_of(trainer).state
    assert model.unused.weight not in state
    assert "last_param" in state[model.sometimes.weight]
    resumed = train(tmp_path, model=extra_model(), resume=str(tmp_path / "checkpoint-3"), **settings)
    assert_equal(weights(resumed), weights(trainer))


# --- Refused before training starts


class Started(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        raise AssertionError("training has started")


@pytest.mark.parametrize("optim", NAMES)
def test_the_stock_trainer_refuses(tmp_path, optim):
    with pytest.raises(ValueError, match="MarsTrainer"):
        train(tmp_path, Trainer, optim=optim, optim_args="exact=true", callbacks=[Started()])


def test_fp16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16"):
        train(tmp_path, optim_args="exact=true", fp16=True, callbacks=[Started()])
    train(tmp_path, fp16=True, max_steps=1)


def test_a_gradient_scaler_that_the_launcher_asked_for_is_refused(tmp_path):
    """`accelerate launch --mixed_precision fp16` makes one without fp16 in the arguments."""
    trainer = make_trainer(tmp_path, optim_args="exact=true", callbacks=[Started()])
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="fp16"):
        trainer.train()


# --- Interruptions


class StopAt(TrainerCallback):
    """Asks to stop after a micro-batch of an update that is not its last."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.slow
def test_a_run_that_stops_in_the_middle_of_an_update_leaves_nothing_to_the_next(tmp_path):
    finals = []
    for stop in (True, False):
        # No state between the two runs but the optimizer's: no schedule, no momentum of the data's order.
        settings = {"optim_args": EXACT, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
        trainer = make_trainer(tmp_path, max_steps=3, **settings)
        trainer.train()
        if stop:
            trainer.args.max_steps = 6
            trainer.add_callback(StopAt(0))
            trainer.train()
            assert trainer.state.global_step == 0
            assert optimizer_of(trainer).previous_grads
            trainer.pop_callback(StopAt)
        trainer.args.max_steps = 2
        set_seed(5)
        trainer.train()
        finals.append(weights(trainer))
    assert_equal(*finals)


def test_batches_that_an_epoch_leaves_over_keep_both_gradients(tmp_path):
    """A stream shorter than a whole number of updates: the Trainer carries the last gradients into the next epoch's
    first update. Without clipping their previous-point gradients are carried along, at the same points.
    """

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(token_blocks(12))

    settings = {"optim_args": EXACT, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0, "max_steps": 3}
    trainer = train(tmp_path, Batches, train_dataset=Stream(), model=tiny_gpt2(**NO_DROPOUT), **settings)
    assert [len(batches) for batches, _ in trainer.updates if batches][:3] == [2, 1, 2]

    model = tiny_gpt2(**NO_DROPOUT).train()
    groups = [[], []]
    for p in model.parameters():
        groups[p.ndim < 2].append(p)
    optimizer = type(optimizer_of(trainer))(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1]}], lr=1e-2, exact=True, gamma=0.3
    )

    def evaluate(batches, num_items_in_batch):
        for batch in batches:
            loss = model(**batch, num_items_in_batch=num_items_in_batch).loss
            (loss / trainer.accelerator.gradient_accumulation_steps).backward()

    step = 0
    for batches, num_items_in_batch in trainer.updates:
        if optimizer.needs_previous_point:
            with optimizer.previous_point():
                evaluate(batches, num_items_in_batch)
        evaluate(batches, num_items_in_batch)
        if len(batches) == 2:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / 3)
            step += 1
            optimizer.step()
            optimizer.zero_grad()
    assert step == 3
    assert_equal(values(model.parameters()), weights(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("at_previous_point", [True, False])
def test_auto_find_batch_size(tmp_path, at_previous_point):
    """Out of memory at either evaluation of the third update: all parameters are x_t when the Trainer starts again."""

    class Small(MarsTrainer):
        points, failed_at = [], None

        def compute_loss(self, model, *args, **kwargs):
            optimizer = optimizer_of(self)
            if model.training and self._train_batch_size == 4 and self.state.global_step == 2:
                if optimizer._previous_point.is_entered == at_previous_point:
                    self.failed_at = self.at_x
                    raise torch.OutOfMemoryError("CUDA out of memory. (a test)")
            return super().compute_loss(model, *args, **kwargs)

        def get_batch_samples(self, *args):
            self.at_x = weights_of(self.model)
            if self.failed_at is not None and self._train_batch_size < 4:
                self.points.append(self.at_x)
            return super().get_batch_samples(*args)

    def weights_of(model):
        return values(model.parameters())

    trainer = train(tmp_path, Small, optim_args=EXACT, auto_find_batch_size=True, max_steps=5)
    assert trainer.state.global_step == 5 and trainer._train_batch_size < 4
    assert_equal(trainer.points[0], trainer.failed_at)


def test_subclasses_are_called_for_both_evaluations(tmp_path):
    """What a training_step of one's own does to its inputs, by chance too, is done at x_{t−1} as well."""

    class Masking(Losses):
        def training_step(self, model, inputs, num_items_in_batch=None):
            labels = inputs["labels"].masked_fill(torch.rand(inputs["labels"].shape) < 0.2, 5)
            return super().training_step(model, {**inputs, "labels": labels}, num_items_in_batch)

    settings = {"optim_args": f"{EXACT},lr_1d=0", "learning_rate": 0.0}
    masking, plain = (train(tmp_path, cls, **settings) for cls in (Masking, Losses))
    assert_equal(masking.evaluated[1::2], masking.evaluated[2::2])
    assert all(not torch.equal(a, b) for a, b in zip(masking.evaluated, plain.evaluated, strict=True))


@pytest.mark.parametrize("k", [1, 3])
def test_processes_exchange_gradients_at_the_last_micro_batch_of_each_evaluation(tmp_path, k):
    """What DDP does in its backward: nothing inside of no_sync, not even in one that encloses another context."""
    inside, synchronised = [], []

    class Watched(MarsTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.no_sync = no_sync

        def compute_loss(self, *args, **kwargs):
            at_previous_point = optimizer_of(self)._previous_point.is_entered
            synchronised.append((at_previous_point, not inside, self.accelerator.gradient_state.sync_gradients))
            return super().compute_loss(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(model):
        inside.append(model)
        yield
        inside.pop()

    train(tmp_path, Watched, optim_args=EXACT, gradient_accumulation_steps=k, max_steps=2)
    last = [i == k - 1 for i in range(k)]
    expected = [(False, *[is_last] * 2) for is_last in last]
    assert synchronised == expected + [(True, *[is_last] * 2) for is_last in last] + expected
