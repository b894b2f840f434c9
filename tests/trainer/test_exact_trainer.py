"""Exact MARS in MarsTrainer: the run of a hand-written loop, with everything that the Trainer does around it."""

import pytest
import torch
from helpers import METHODS, NAMES, assert_close, assert_equal, tiny_gpt2, values
from torch import nn
from trainer_helpers import (
    APPROX,
    EXACT,
    NO_DROPOUT,
    Batches,
    Losses,
    Recorder,
    losses,
    optimizer_of,
    token_blocks,
    train,
    weights,
)
from transformers import Trainer

from hf_mars import MarsTrainer, param_groups

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
