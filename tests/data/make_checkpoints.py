"""Write what an earlier version saved, for test_old_checkpoints.py and test_old_training.py.

Usage: make_checkpoints.py FOLDER, with PYTHONPATH the checkout of the version that is to write; on a CPU.

For every case FOLDER gets NAME.pt with "class" and "settings"; after three steps "params" and "optimizer" (the
state_dict); "gradients", and in the exact form "previous_gradients", of one step more; and "after" it the parameters
and each key of the state, of all parameters in one vector. FOLDER/trainer gets optimizer.pt and training_args.bin of a
checkpoint that transformers' Trainer wrote.
"""

import copy
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import hf_mars  # noqa: F401  # the names in transformers
from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo

METHODS = {
    "mars_adamw": (MarsAdamW, {}),
    "mars_lion": (MarsLion, {}),
    "mars_shampoo": (MarsShampoo, {}),
    "mars_m": (MarsShampoo, {"adjust_lr_fn": "match_rms_adamw"}),
}
FORMS = {"approx": {}, "no_clip": {"max_norm": None}, "exact": {"exact": True}}
CASES = {f"{method}_{form}": (method, settings) for method in METHODS for form, settings in FORMS.items()}
CASES["mars_adamw_bfloat16"] = ("mars_adamw", {})
CASES["mars_lion_half_state"] = ("mars_lion", {"state_dtype": "bfloat16", "last_grad_dtype": "bfloat16"})
KINDS = {"matrix": [(6, 4), (3, 5)], "embedding": [(7, 3)], "1d": [(5,)]}
SCALES = (0.05, 2.0, 0.05, 1.0)  # some gradients are clipped, some are not


def tensors(seed, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(s, generator=generator)).to(dtype) for shapes in KINDS.values() for s in shapes]


def groups_of(params):
    params = iter(params)
    return [{"kind": kind, "params": [next(params) for _ in shapes]} for kind, shapes in KINDS.items()]


def give(params, gradients):
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()


def in_vectors(params, optimizer):
    """All parameters, and each key of all their states, as a float32 vector."""
    states = [optimizer.state[p] for p in params]
    tensors = {key: [state[key] for state in states if key in state] for key in sorted(set().union(*states))}
    tensors["param"] = params
    return {key: torch.cat([t.detach().float().flatten() for t in ts]) for key, ts in tensors.items()}


def make(name):
    method, settings = CASES[name]
    dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    cls, keywords = METHODS[method]
    settings = {"lr": 0.02, "weight_decay": 0.1, "gamma": 0.3, **keywords, **settings}
    params = [nn.Parameter(t) for t in tensors(0, dtype)]
    optimizer = cls(groups_of(params), **settings)
    saved = {"class": cls.__name__, "settings": settings}
    for t, scale in enumerate(SCALES):
        gradients = tensors(1 + t, dtype, scale)
        previous = tensors(100 + t, dtype, scale) if settings.get("exact") else None
        if t == len(SCALES) - 1:
            saved["params"] = [p.detach().clone() for p in params]
            saved["optimizer"] = copy.deepcopy(optimizer.state_dict())
            saved["gradients"], saved["previous_gradients"] = gradients, previous
        if previous is not None:
            with optimizer.previous_point():
                give(params, previous)
        give(params, gradients)
        optimizer.step()
        optimizer.zero_grad()
    saved["after"] = in_vectors(params, optimizer)
    return saved


def make_trainer(output_dir):
    """The stock Trainer with a tiny GPT-2; the same for whoever loads what it saved."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    sizes = {"vocab_size": 16, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    tokens = [torch.arange(i, i + 8) % 16 for i in range(16)]
    args = TrainingArguments(
        output_dir=output_dir,
        optim="mars_adamw",
        optim_args="gamma=0.05,lr_1d=2e-3",
        learning_rate=1e-2,
        weight_decay=0.1,
        max_steps=3,
        save_steps=3,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, args, train_dataset=[{"input_ids": t, "labels": t} for t in tokens])


def train(folder):
    make_trainer("out").train()
    for name in ("optimizer.pt", "training_args.bin"):
        shutil.copy(Path("out/checkpoint-3") / name, folder / name)


def main(folder):
    (folder / "trainer").mkdir(parents=True, exist_ok=True)
    for name in CASES:
        torch.save(make(name), folder / f"{name}.pt")
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        train(folder / "trainer")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]).resolve())
