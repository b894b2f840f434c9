"""What the compiled step on CPUs (_cpu.c) alone is asked; what GPUs' kernels are asked too is in test_kernels.py."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make, make_gradients, make_params, run_steps
from kernel_helpers import EVERY_FUSED, EXECUTIONS, NEEDS_CPU, cpu

from hf_mars.optim import MarsAdamW

pytestmark = NEEDS_CPU


@pytest.fixture
def execution():
    return EXECUTIONS["cpu"]


def test_it_is_built():
    """Here, where the tests run; elsewhere a step without it is slower and as right."""
    assert cpu.is_compiled()


def test_make_package_knows_how_to_call_it():
    step = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "package.py"))["STEP"]
    subprocess.run([sys.executable, "-c", step, cpu._cpu.__file__], check=True)


# ---- what the clip needs to read: where ‖g_t‖ and the known ‖g_{t−1}‖ bound ‖c_t‖ well below max_norm, g_t alone ----


@EVERY_FUSED
def test_the_last_gradient_is_only_read(method):
    """A step that changes nothing, after a look at the norms, has it still."""
    (param,) = params = make_params([(40, 30)], dtype=torch.float32)
    optimizer = make(method, params, gamma=0.5)
    for seed, scale in enumerate((1e-5, 1e-5, 3.0, 3.0, 1e-5, 1e-5)):
        last_grad = optimizer.state[param].get("last_grad")
        before = None if last_grad is None else last_grad.clone()
        run_steps(optimizer, params, make_gradients(params, 1, scales=(scale,), seed=seed))
        assert before is None or torch.equal(last_grad, before)


@EVERY_FUSED
def test_an_elements_result_does_not_depend_on_its_address(method):
    """Else a resumed run would not be the same run bit for bit: memory lies elsewhere there."""
    finals = []
    for offset in range(17):
        (values_,), step = make_params([(37, 5)], dtype=torch.float32), make_gradients(make_params([(37, 5)]), 4)
        memory = torch.zeros(values_.numel() + offset)
        param = torch.nn.Parameter(memory[offset:].view(37, 5).copy_(values_.detach()))
        optimizer = make(method, [param], lr=0.01, weight_decay=0.1, gamma=0.5)
        for (gradient,) in step:
            param.grad = torch.zeros(gradient.numel() + offset)[offset:].view(37, 5).copy_(gradient)
            optimizer.step()
        finals.append(param.detach().clone())
    assert all(torch.equal(final, finals[0]) for final in finals)


@pytest.mark.parametrize(
    "dtype, settings",
    [(torch.float64, {}), (torch.float32, {"last_grad_dtype": "bfloat16"})],
    ids=["float64", "last_grad_dtype"],
)
def test_what_it_does_not_take_is_composed(dtype, settings, calls):
    (param,) = make_params([(4, 3)], dtype=dtype)
    optimizer = MarsAdamW([param], **settings)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert not calls and optimizer.state[param]["exp_avg"].count_nonzero() == 12


def test_without_a_compiler_steps_are_composed(calls, monkeypatch):
    monkeypatch.setattr(cpu, "_cpu", None)
    (param,) = params = make_params([(4, 3)], dtype=torch.float32)
    optimizer = MarsAdamW(params)
    run_steps(optimizer, params, make_gradients(params, 2))
    assert not calls and optimizer.state[param]["step"] == 2
