"""Manners of a torch optimizer: closures, schedulers, engines that change parameters, names, imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    EVERY_CLASS,
    EVERY_METHOD,
    FEW_SHAPES,
    METHODS,
    assert_close,
    factor,
    kinds,
    make,
    make_gradients,
    make_params,
    run_steps,
    values,
)
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hf_mars.optim import MarsAdamW, MarsLion

OPTIM = Path(sys.modules["hf_mars.optim"].__file__).parent


@EVERY_METHOD
def test_closure(method):
    params = make_params(FEW_SHAPES)
    optimizer = make(method, params)
    before = values(params)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[0] == pytest.approx(sum((x**2).sum().item() for x in before))
    assert losses[-1] < losses[0]
    assert optimizer.step() is None


@EVERY_METHOD
def test_schedulers_scale_every_group(method):
    params = make_params(FEW_SHAPES)
    optimizer = make(method, params, lr=0.02, lr_1d=0.005)
    scheduler = LambdaLR(optimizer, factor)
    for t, step in enumerate(make_gradients(params, 20)):
        matrix, vector = (group["lr"] for group in optimizer.param_groups)
        assert matrix == pytest.approx(0.02 * factor(t))
        assert matrix / vector == pytest.approx(4.0)
        run_steps(optimizer, params, [step], scheduler)


@pytest.mark.parametrize("max_norm", [1.0, None])
@EVERY_METHOD
def test_step_never_waits_for_the_device(method, max_norm):
    """A tensor on "meta" has no value: whatever asks for one (.item(), float(), if) raises."""
    params = [nn.Parameter(p.to("meta")) for p in make_params(dtype=torch.float32)]
    optimizer = make(method, params, max_norm=max_norm, weight_decay=0.1, foreach=True)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


@pytest.mark.parametrize("cls", [MarsAdamW, MarsLion])
def test_empty_shards(cls):
    """Engines that slice flattened parameters leave some ranks with nothing of a parameter."""
    params = make_params([(12,), (0,)])
    optimizer = cls([{"params": params, "kind": "matrix"}], lr=0.02, max_norm=None)
    run_steps(optimizer, params, make_gradients(params, 3))
    assert params[0].isfinite().all()


@EVERY_METHOD
def test_settings_are_plain_values(method):
    """Checkpoint formats take numbers, names and lists of them; FSDP2's refuses a torch.dtype."""
    optimizer = make(method, make_params(), state_dtype=torch.bfloat16, last_grad_dtype="float32")

    def is_plain(value):
        return type(value) in (int, float, str, bool, type(None)) or (
            type(value) in (tuple, list) and all(map(is_plain, value))
        )

    for group in optimizer.param_groups:
        assert (group["state_dtype"], group["last_grad_dtype"]) == ("bfloat16", "float32")
        assert all(is_plain(value) for key, value in group.items() if key != "params")


@EVERY_CLASS
def test_parameters_that_fsdp1_flattens_later_are_refused(cls):
    """accelerator.prepare(model, optimizer) wraps the model when the optimizer is made."""
    params = make_params([(6, 4)])
    optimizer = cls(params, max_norm=None)
    params[0].data = params[0].data.flatten()
    params[0]._fsdp_flattened = True
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ValueError, match=r"FSDP1 has flattened a parameter.*fsdp_version: 2"):
        optimizer.step()


@EVERY_METHOD
def test_named_parameters(method):
    """torch takes (name, parameter) pairs; the names survive the split, where torch's checkpoints look for them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(method, model.named_parameters())
    assert kinds(optimizer) == ["matrix", "1d"]
    names = [group.get("param_names") for group in optimizer.param_groups]
    assert names == [["0.weight", "1.weight"], ["0.bias", "1.bias"]]


def imported_modules(file):
    """Every module that a file imports anywhere in it, with leading dots for relative ones."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


TRITON = (
    "copies.py",
    "launch.py",
    *(f"triton_{name}.py" for name in ("common", "copies", "matrices", "norms", "update")),
)


def test_only_torch_is_imported():
    files = sorted(OPTIM.rglob("*.py"))
    assert {"mars.py", "adamw.py", "newton_schulz.py"} <= {file.name for file in files}
    for file in files:
        # Triton comes with torch's builds for GPUs; gpu.py does without where it is missing.
        allowed = {"torch", *sys.stdlib_module_names, *({"triton"} if file.name in TRITON else ())}
        for module in imported_modules(file):
            dots = len(module) - len(module.lstrip("."))
            inside = 0 < dots <= len(file.relative_to(OPTIM).parts) or module.startswith("hf_mars.optim")
            assert inside or module.split(".")[0] in allowed, f"{file.name} imports {module}"


@pytest.mark.slow
def test_runs_where_there_is_no_transformers():
    """hf_mars.optim by itself, its parent package not executed and transformers impossible to import."""
    script = f"""
import sys, types, torch
sys.modules.update(transformers=None, accelerate=None, datasets=None)
parent = types.ModuleType("hf_mars")
parent.__path__ = [{str(OPTIM.parent)!r}]
sys.modules["hf_mars"] = parent
from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo
w = torch.nn.Parameter(torch.ones(3, 2))
for cls in (MarsAdamW, MarsLion, MarsShampoo):
    w.grad = torch.ones(3, 2)
    cls([w]).step()
assert (w < 1).all()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("method", ["mars_lion", "mars_shampoo"])
def test_clip_turned_off_midway_leaves_no_parameter_behind(method):
    """One that gets its first gradient later, alone, is updated as those that already keep a g_{t-1}."""
    cls, keywords, _ = METHODS[method]
    finals = []
    for max_norm in (None, 1e30):
        params = make_params([(3, 4), (4, 3)])
        optimizer = cls(params, lr=0.02, max_norm=1.0, **keywords)
        gradients = make_gradients(params, 12)
        for t, (first, second) in enumerate(gradients):
            optimizer.param_groups[0]["max_norm"] = 1.0 if t < 4 else max_norm
            run_steps(optimizer, params, [[None if t == 5 else first, None if t < 5 else second]])
        finals.append(values(params))
    assert_close(*finals, 1e-12)
