"""The Triton kernels on a machine without a GPU: through Triton's interpreter, and through its compiler."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_helpers import gpu
from launch_helpers import ROOT

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(gpu.is_interpreted(), reason="these tests start the interpreter themselves")
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("test_gpu_kernels.py", ""),
        ("test_kernels.py", "gpu"),
        ("test_reference.py", "equals_the_reference and float64 and (adamw or lion)"),
        ("test_laws.py", "one_buffer or constant_gradient"),
    ],
)
def test_through_the_interpreter(file, chosen):
    """The tests of every other device."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, HERE / file, "-k", chosen], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 10 and "skipped" not in result.stdout


TARGETS = {"Turing": 75, "Ampere": 80, "Hopper": 90}
TABLES = {"table": "*i64", "numbers": "*fp64", "tensor_of_block": "*i64", "stride": "i32"}


def compiled(kernel, target, arguments, constants):
    """What Triton makes of a kernel for NVIDIA GPUs of that compute capability, beside the machine code its PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": gpu.WARPS}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm


def floats(*names):
    return dict.fromkeys(names, "*fp32")


@pytest.mark.slow
@pytest.mark.skipif(gpu.is_interpreted(), reason="nothing is compiled then")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_compiles_for_gpus(target, dtype):
    import triton.language as tl

    kernels = importlib.import_module(f"{gpu.__package__}.triton_kernels")

    dtype = getattr(tl, dtype)
    read = {"WIDE": tl.float32, "G_DTYPE": dtype, "PREV_DTYPE": dtype, "CORRECTED": True, "BLOCK": gpu.BLOCK}
    sums = {"knowledge": "*i32", **floats("sums_of_g", "sums_of_c")}
    for again in (False, True):
        arguments = {**TABLES, **floats("prev_norms"), **sums}
        assert "cubin" in compiled(kernels.measure, target, arguments, {**read, "AGAIN": again})
    small = {"WIDE": tl.float32, "REDUCED": gpu.REDUCED}
    tables = {key: TABLES[key] for key in ("table", "numbers", "stride")}
    arguments = {**tables, **floats("prev_norms"), "knowledge": "*i32", **floats("sums_of_g", "norms_of_g")}
    assert "cubin" in compiled(kernels.judge, target, arguments, small)
    results = floats("clip_factors", "step_sizes", "inverse_root_bias2")
    flags = {**small, "CORRECTED": True, "CLIPS": True, "IS_ADAMW": True}
    assert "cubin" in compiled(kernels.prepare, target, {**tables, **sums, **results}, flags)
    for is_adamw in (True, False):
        compensated = dtype == tl.bfloat16
        flags = {"KEEPS_LAST_GRAD": True, "CLIPS": True, "IS_ADAMW": is_adamw, "COMPENSATED": compensated}
        constants = {**read, **flags, "X_DTYPE": dtype, "M_DTYPE": dtype, "V_DTYPE": dtype}
        asm = compiled(kernels.update, target, {**TABLES, **results}, constants)
        assert "cubin" in asm
        operands = 4 + is_adamw + compensated  # x, g, g_{t−1}, m; v; compensation
        bytes_a_thread = gpu.BLOCK // (32 * gpu.WARPS) * dtype.primitive_bitwidth // 8
        # Whole blocks move in 16-byte pieces, and nothing is spilled to local memory.
        assert asm["ptx"].count("ld.global.v4.b32") == operands * bytes_a_thread // 16
        assert asm["ptx"].count("st.global.v4.b32") == operands * bytes_a_thread // 16 - bytes_a_thread // 16
        assert ".local" not in asm["ptx"]
        if compensated and target >= 80:  # to nearest, which Turing is made to do in several instructions
            assert "cvt.rn.bf16" in asm["ptx"] and "cvt.rz" not in asm["ptx"]


def test_a_cpu_does_not_import_triton():
    script = f"""
import sys, torch
from hf_mars.optim import MarsAdamW
param = torch.nn.Parameter(torch.ones(3, 2))
param.grad = torch.ones(3, 2)
MarsAdamW([param]).step()
assert "{gpu.__package__}.triton_kernels" not in sys.modules
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_without_triton_is_said(recwarn):
    gpu.kernels_for.cache_clear()
    assert gpu.kernels_for(torch.device("cuda")) is None
    gpu.kernels_for.cache_clear()
    assert "Triton kernels do not run on cuda" in str(recwarn.pop(UserWarning).message)
