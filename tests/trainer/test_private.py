"""What hf_mars uses of other packages that they do not promise: it is there, or the test says what is broken.

A new version that fails here needs a change where the table says; the rest of the tests then say how much.
"""

import ast
import enum
import re
import sys

import accelerate
import datasets
import pytest
import torch
import transformers
from helpers import assert_close, make_gradients, make_params, run_steps, values
from launch_helpers import ROOT
from torch.utils import _foreach_utils
from transformers import trainer_optimizer
from transformers.integrations import deepspeed

from hf_mars import MarsAdamW
from hf_mars.optim import last_grad

# name -> (what has it, what breaks without it); None: the fallback makes it slower, and is tested below.
USES = {
    "_OPTIMIZER_HANDLERS": (trainer_optimizer, "no optimizer for the names: trainer/registry.py"),
    "_member_names_": (enum.Enum, "the names: trainer/registry.py"),
    "_member_map_": (enum.Enum, "the names: trainer/registry.py"),
    "_value2member_map_": (enum.Enum, "the names: trainer/registry.py"),
    "_clip_grad_norm": (transformers.Trainer, "the clip, exact mode's too: trainer/trainer.py"),
    "_get_grad_norm": (transformers.Trainer, "steps that are skipped without a clip: trainer/registry.py"),
    "_get_output_dir": (transformers.Trainer, "whole checkpoints: trainer/trainer.py"),
    "_get_default_store": (torch.distributed.distributed_c10d, "signals on several processes: trainer/signals.py"),
    "_device_types": (torch.distributed.ProcessGroup, "where ranks exchange: optim/sharding/devices.py"),
    "_init_training_state": (transformers.Trainer, "resumed runs that have ended: trainer/trainer.py"),
    "_run_epoch": (transformers.Trainer, "resumed runs that have ended: trainer/trainer.py"),
    "_set_sync_gradients": (accelerate.state.GradientState, "exact mode's accumulation: trainer/trainer.py"),
    "_fingerprint": (datasets.Dataset.from_dict({}), "the cache of tokens: clm/blocks.py"),
    "_hf_deepspeed_config_weak_ref": (deepspeed, "run_clm.py with ZeRO-3: clm/model.py"),
    "_actions": (transformers.HfArgumentParser([]), "arguments of many values: clm/command_line.py"),
    "_disable_dynamo": (torch, "compiled steps: optim/mars.py"),
    "_is_view": (torch.Tensor, "gradients that are views: optim/exact.py, optim/last_grad.py"),
    "_version": (torch.Tensor, "known norms: optim/last_grad.py"),
    **{
        f"_{whose}_{when}_hooks": (owner, "hooks of step() that see unclipped gradients: trainer/clipping.py")
        for whose, owner in (
            ("optimizer_step", torch.optim.SGD([torch.ones(1)])),
            ("global_optimizer", sys.modules["torch.optim.optimizer"]),
        )
        for when in ("pre", "post")
    },
    "_ConvNd": (torch.nn.modules.conv, "layouts of convolutions: optim/groups.py"),
    "_module_state_mapping": (
        torch.distributed._composable_state,
        "exact mode with FSDP2: optim/sharding/gathered.py",
    ),
    "_cdata": (torch.UntypedStorage(1), "owners of gradients: optim/last_grad.py"),
    "_C": (torch, "owners of gradients: optim/last_grad.py"),
    "_lazy_clone": (torch, None),
    "_use_count": (torch.Tensor, None),
    "_storage_Use_Count": (torch._C, None),
    "_data_address": (torch._C, None),
    "_get_fused_kernels_supported_devices": (_foreach_utils, None),
    "_is_amx_tile_supported": (torch.cpu, None),
    "_is_avx512_bf16_supported": (torch.cpu, None),
}
# Kernels for lists of tensors, of torch.optim's own: composed steps and norms.
FOREACH = ("add_", "clamp_min", "copy_", "div", "div_", "lerp", "lerp_", "mul", "mul_", "norm", "sign", "sqrt")
# Not private in spite of the underscore, or ours; and DeepSpeed's, without which optim/sharding/zero.py says so.
PUBLIC = {"_replace", "_hashable_values_", "_dp_group", "_z3_optimizer"}
# Methods of a class of ours, too, which takes them for ours below.
OVERRIDDEN = {"_init_training_state", "_run_epoch", "_clip_grad_norm", "_get_grad_norm"}


@pytest.mark.parametrize("name", USES)
def test_it_is_there(name):
    owner, broken = USES[name]
    assert hasattr(owner, name), f"{owner} lacks {name}; broken: {broken or 'nothing, but steps are slower'}"


@pytest.mark.parametrize("name", FOREACH)
def test_kernels_for_lists_are_there(name):
    assert hasattr(torch, f"_foreach_{name}"), "composed steps: optim/algorithm, optim/sharding"


def test_every_handler_has_the_signature_of_ours():
    """From a context with args and model to a class and its keywords."""
    fields = {"args", "model", "optimizer_kwargs", "adam_kwargs", "optim_args"}
    assert fields <= set(trainer_optimizer.OptimizerContext.__dataclass_fields__)


def test_the_table_is_complete():
    """Underscored attributes of what is not ours, in all of hf_mars."""
    used, ours = set(), set()
    for path in (ROOT / "hf_mars").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute):
                (ours if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            elif isinstance(node, ast.Constant) and node.value in USES:  # of getattr
                used.add(node.value)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used |= {alias.name for alias in node.names}
    private = {name for name in used - ours if re.match(r"_[^_]", name) and not name.startswith("_foreach_")}
    assert private == (USES.keys() - OVERRIDDEN) | PUBLIC
    assert {name for name in used if name.startswith("_foreach_")} == {f"_foreach_{name}" for name in FOREACH} | {
        "_foreach_utils"
    }


# The others with a fallback cannot be taken away: they belong to types written in C, or are asked for at import.
WITH_FALLBACK = [name for name, (owner, broken) in USES.items() if broken is None and name in vars(owner)]


@pytest.mark.parametrize("name", WITH_FALLBACK)
def test_without_it_steps_are_the_same(name, monkeypatch):
    params, again = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    gradients = make_gradients(params, 4)
    run_steps(MarsAdamW(params, max_norm=1.0), params, gradients)
    monkeypatch.delattr(USES[name][0], name)
    monkeypatch.setattr(last_grad, "_OWNERS_OF_A_FRESH_GRADIENT", last_grad._owners_of_a_fresh_gradient())
    run_steps(MarsAdamW(again, max_norm=1.0), again, gradients)
    assert_close(values(params), values(again), 1e-6)
