"""Exact MARS in MarsTrainer: the run of a hand-written loop, with everything that the Trainer does around it."""

import contextlib
import random

import pytest
import torch
from helpers import METHODS, assert_close, assert_equal, tiny_gpt2, values
from torch import nn
from trainer_helpers import losses, make_trainer, optimizer_of, token_blocks, train, weights
from transformers import Trainer, TrainerCallback, set_seed

from hf_mars import MarsTrainer, param_groups

NAMES = list(METHODS)
EXACT = "exact=true,gamma=0.3"
APPROX = "gamma=0.3"
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


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


# --- The same run as without a Trainer


@pytest.mark.parametrize("optim", NAMES)
def test_the_run_of_a_plain_loop(tmp_path, optim):
    """Same data, same masks, unequal numbers of labels, clipping that is active at both points, a schedule."""
    k, max_norm, recorder = 2, 0.05, Recorder()
    settings = {"optim": optim, "optim_args": EXACT, "learning_rate": 5e-3, "max_steps": 4}
    settings |= {"gradient_accumulation_steps": k, "max_grad_norm": max_norm, "callbacks": [recorder]}
    trainer = train(tmp_path, Batches, **settings)
    model = tiny_gpt2().train()
    cls, keywords, _ = METHODS[optim]
    groups = param_groups(model, weight_decay=0.1)
    optimizer = cls(groups, lr=5e-3, exact=True, gamma=0.3, **keywords)
    theirs = optimizer_of(trainer)

    def sizes(optimizer):
        return [(group["kind"], len(group["params"])) for group in optimizer.param_groups if group["params"]]

    if optim in ("mars_shampoo", "mars_m"):
        assert sizes(optimizer) == sizes(theirs)
    lr_of = {
        id(p): [lrs[i] for lrs in recorder.lrs] for i, group in enumerate(theirs.param_groups) for p in group["params"]
    }
    lr_of = {id(p): lr_of[id(q)] for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True)}
    lr_of_group = [lr_of[id(group["params"][0])] if group["params"] else [0.0] * 4 for group in optimizer.param_groups]

    def evaluate(batches, num_items_in_batch):
        for batch in batches:
            loss = model(**batch, num_items_in_batch=num_items_in_batch).loss
            (loss / trainer.accelerator.gradient_accumulation_steps).backward()  # 1, but for the oldest transformers
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        assert norm > max_norm

    torch.set_rng_state(trainer.random_state)  # set once: what follows is one epoch, whose stream is the masks alone
    for t, (batches, num_items_in_batch) in enumerate(trainer.updates):
        assert len(batches) == k
        if t > 0:
            with optimizer.previous_point():
                evaluate(batches, num_items_in_batch)
        evaluate(batches, num_items_in_batch)
        for group, lrs in zip(optimizer.param_groups, lr_of_group, strict=True):
            group["lr"] = lrs[t]
        optimizer.step()
        optimizer.zero_grad()
    assert len(trainer.updates) == 4
    # Not bit for bit: on an AMD EPYC the gradients of attention's projection differed in their last bit.
    assert_close(values(model.parameters()), weights(trainer), 1e-4)


@pytest.mark.parametrize("optim", NAMES)
def test_accumulated_micro_batches_equal_one_large_batch(tmp_path, optim):
    """k = 4 micro-batches of 2 against one of 8, without dropout; the micro-batches' label counts differ."""
    settings = {"optim": optim, "optim_args": EXACT, "learning_rate": 1e-3}
    trainers = []
    for size, k in ((2, 4), (8, 1)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": k}
        trainers.append(train(tmp_path, Batches, model=tiny_gpt2(**NO_DROPOUT), **sizes, **settings))
        if trainers[-1].accelerator.gradient_accumulation_steps != 1:
            pytest.skip("this transformers divides accumulated gradients by their number twice, in every mode")
    counts = [{int((b["labels"][:, 1:] != -100).sum()) for b in batches} for batches, _ in trainers[0].updates]
    assert all(len(count) > 1 for count in counts)
    for accumulated, whole in zip(*(losses(trainer) for trainer in trainers), strict=True):
        assert accumulated == pytest.approx(whole, rel=1e-5)
    # float32, and Newton-Schulz multiplies the rounding of small singular values
    assert_close(*(weights(trainer) for trainer in trainers), 1e-4 if "adamw" in optim or "lion" in optim else 1e-3)


# --- Random numbers


@pytest.mark.parametrize("k", [1, 3])
def test_the_random_stream_is_that_of_an_approx_run(tmp_path, k):
    """Callbacks and data draw the same numbers, and the first step, which has no correction, gives the same loss."""
    results = []
    for cls, optim, optim_args in [
        (MarsTrainer, "mars_adamw", EXACT),
        (MarsTrainer, "mars_adamw", APPROX),
        (Trainer, "adamw_torch", ""),
    ]:
        recorder = Recorder()
        settings = {"optim": optim, "optim_args": optim_args, "gradient_accumulation_steps": k}
        results.append((train(tmp_path, cls, callbacks=[recorder], **settings), recorder))
    (exact, of_exact), (approx, of_approx), (stock, of_stock) = results
    assert of_exact.drawn == of_approx.drawn == of_stock.drawn
    assert len(of_exact.drawn) == 2
    # The first step has no correction: what it leads to, the second loss, is equal too.
    assert losses(exact)[0] == losses(approx)[0] == losses(stock)[0]
    assert losses(exact)[1] == losses(approx)[1]
    assert losses(exact)[3:] != losses(approx)[3:]


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_dropout_is_replayed(tmp_path, settings):
    """lr = 0: x_{t−1} = x_t, so that both evaluations of a micro-batch have the same loss, bit for bit."""
    no_move = {"optim_args": f"{EXACT},lr_1d=0", "learning_rate": 0.0}
    trainer = train(tmp_path, Losses, gradient_accumulation_steps=2, **no_move, **settings)
    first, rest = trainer.evaluated[:2], trainer.evaluated[2:]
    assert len(rest) == 5 * 4
    assert len({float(loss) for loss in first + rest}) == 12  # another mask and batch for every micro-batch
    for i in range(0, len(rest), 4):
        assert_equal(rest[i : i + 2], rest[i + 2 : i + 4])


# --- Precision, checkpointing, ties


def test_bf16_autocast(tmp_path):
    exact, approx = (train(tmp_path, Losses, optim_args=args, bf16=True) for args in (EXACT, APPROX))
    assert losses(exact)[:2] == losses(approx)[:2]
    # The evaluation at x_{t−1} is another one than at x_t: the weights that autocast has cast are not kept.
    previous, current = exact.evaluated[1::2], exact.evaluated[2::2]
    assert all(not torch.equal(p, c) for p, c in zip(previous, current, strict=True))
    assert {p.dtype for p in exact.model.parameters()} == {torch.float32}
    assert losses(exact) != losses(train(tmp_path, optim_args=EXACT))


def test_activation_checkpointing_changes_nothing(tmp_path):
    runs = [train(tmp_path, optim_args=EXACT, gradient_checkpointing=on) for on in (True, False)]
    assert losses(runs[0]) == losses(runs[1])
    assert_equal(*(weights(run) for run in runs))


def test_tied_weights_stay_tied(tmp_path):
    trainer = train(tmp_path, optim_args=EXACT)
    model = trainer.model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(optimizer_of(trainer).state) == len(list(model.parameters()))
    untied = train(tmp_path, optim_args=EXACT, model=tiny_gpt2(tie_word_embeddings=False))
    assert losses(trainer) != losses(untied)


# --- Clipping


def test_each_evaluation_is_clipped_by_its_own_norm(tmp_path, monkeypatch):
    """As in the authors' training script. The logged norm is that of x_t, before clipping."""
    norms = []
    clip = MarsTrainer._clip_grad_norm

    def recorded(self, model):
        norm = clip(self, model)
        left = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        norms.append((float(norm), float(left)))
        return norm

    monkeypatch.setattr(MarsTrainer, "_clip_grad_norm", recorded)
    trainer = train(tmp_path, optim_args=EXACT, max_grad_norm=0.1, gradient_accumulation_steps=2)
    assert len(norms) == 1 + 2 * 5
    assert all(norm > 0.1 and left == pytest.approx(0.1, rel=1e-3) for norm, left in norms)
    logged = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert logged == pytest.approx([norm for norm, _ in norms[:1] + norms[2::2]], rel=1e-6)


# --- Around the steps


def test_evaluation_and_checkpoints_in_between_change_nothing(tmp_path):
    """Without dropout and within an epoch: a data loader draws a seed, in every Trainer, and evaluation has one."""
    busy = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    busy |= {"save_strategy": "steps", "save_steps": 2}
    settings = {"gradient_accumulation_steps": 2, "max_steps": 4, "optim_args": EXACT}
    plain, between = (train(tmp_path, model=tiny_gpt2(**NO_DROPOUT), **settings, **s) for s in ({}, busy))
    assert losses(plain) == losses(between)
    assert_equal(weights(between), weights(plain))
    recorders = [Recorder(), Recorder()]
    for recorder, optim_args in zip(recorders, (EXACT, APPROX), strict=True):
        train(tmp_path, callbacks=[recorder], **{**settings, **busy, "optim_args": optim_args})
    assert recorders[0].drawn == recorders[1].drawn


@pytest.mark.parametrize("optim", NAMES)
def test_resuming_from_every_checkpoint_is_bit_exact(tmp_path, optim):
    """Through the first step's, which holds the first x_{t−1}, an epoch's end (4 updates, the last one short), and
    the middle of one; the random stream after the run too.
    """
    settings = {"optim": optim, "optim_args": EXACT, "gradient_accumulation_steps": 2}
    settings |= {"learning_rate": 5e-3, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    settings |= {"train_dataset": token_blocks(26)}
    recorder = Recorder()
    whole = train(tmp_path, callbacks=[recorder], **settings)
    for step in range(1, 6):
        again = Recorder()
        resumed = train(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), callbacks=[again], **settings)
        assert losses(resumed)[step:] == losses(whole)[step:]
        assert_equal(weights(resumed), weights(whole))
        assert again.drawn == recorder.drawn


def test_totals(tmp_path):
    """Loss and tokens are those of x_t: data that was learned from. total_flos is work done, and counts both."""
    settings = {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": "all", "max_steps": 4}
    exact, approx = (train(tmp_path, optim_args=args, **settings) for args in (EXACT, APPROX))
    assert exact.state.num_input_tokens_seen == approx.state.num_input_tokens_seen == 4 * 2 * 4 * 12
    assert exact.state.total_flos == approx.state.total_flos * 7 / 4  # the first step has one evaluation
    assert exact.state.global_step == 4
    logged = train(tmp_path, Losses, optim_args=EXACT, **settings)
    current = logged.evaluated[:2] + [loss for i in range(2, 14, 4) for loss in logged.evaluated[i + 2 : i + 4]]
    assert losses(logged) == pytest.approx([float(a + b) for a, b in zip(current[::2], current[1::2], strict=True)])


def test_buffers_see_both_evaluations(tmp_path):
    """Running statistics are no parameters: documented, and the reason why a batch-normed model differs a little."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, input_ids, labels):
            return {"loss": self.norm(self.linear(input_ids.float())).square().mean() + self.linear.weight.sum()}

    trainer = train(tmp_path, optim_args=EXACT, model=Counting(), max_steps=3)
    assert trainer.model.norm.num_batches_tracked == 1 + 2 * 2


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
            assert optimizer_of(trainer)._previous_grads
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
                group["lr"] = (1e-2 if group["kind"] == "matrix" else 5e-3) * (1 - step / 3)
            step += 1
            optimizer.step()
            optimizer.zero_grad()
    assert step == 3
    assert_equal(values(model.parameters()), weights(trainer))


@pytest.mark.parametrize("at_previous_point", [True, False])
def test_auto_find_batch_size(tmp_path, at_previous_point):
    """Out of memory at either evaluation of the third update: all parameters are x_t when the Trainer starts again."""

    class Small(MarsTrainer):
        points, failed_at = [], None

        def compute_loss(self, model, *args, **kwargs):
            optimizer = optimizer_of(self)
            if model.training and self._train_batch_size == 4 and self.state.global_step == 2:
                if optimizer._at_previous_point == at_previous_point:
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
            at_previous_point = optimizer_of(self)._at_previous_point
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
