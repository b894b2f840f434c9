"""The Triton kernels on a machine without a GPU: through Triton's interpreter, and through its compiler."""

import functools
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

from hf_mars.optim.kernels import launch

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent


# By file, the tests that are chosen and how many these are at least, lest a name changes and none is chosen.
EVERY_TIME = {
    "test_gpu_kernels": ("", 40),
    "test_gpu_matrices": ("", 20),
    "test_kernels": ("gpu", 40),
    "test_reference": ("equals_the_reference and float64 and adamw and (max_norm_0.3 or optimize_1d)", 2),
    "test_laws": ("one_buffer and mars_lion and 0.025 or constant_gradient and 0.025", 2),
    "test_global_clip": (
        "multiplied_first and kernels and not float64 and (mars_adamw and bound or mars_lion and own)",
        4,
    ),
}
EXHAUSTIVE = {
    "test_reference": ("equals_the_reference and float64", 40),
    "test_laws": ("one_buffer or constant_gradient", 14),
    "test_global_clip": ("multiplied_first and kernels", 80),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a machine in full use
@pytest.mark.skipif(gpu.is_interpreted(), reason="these tests start the interpreter themselves")
@pytest.mark.parametrize(
    "files",
    [EVERY_TIME, *(pytest.param({file: tests}, marks=pytest.mark.exhaustive) for file, tests in EXHAUSTIVE.items())],
)
def test_through_the_interpreter(files):
    """The tests of every other device."""
    chosen = " or ".join(f"({file}.py and ({names or file}))" for file, (names, _) in files.items())
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    paths = [HERE / f"{file}.py" for file in files]
    result = subprocess.run(
        [*command, *paths, "-k", chosen], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout
    for file, (_, at_least) in files.items():
        assert len(re.findall(rf"/{file}\.py::.* PASSED", result.stdout)) >= at_least, file


TARGETS = {"Turing": ("cuda", 75), "Ampere": ("cuda", 80), "Hopper": ("cuda", 90), "MI300": ("hip", "gfx942")}
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
compiles = [
    pytest.mark.slow,
    pytest.mark.skipif(gpu.is_interpreted(), reason="nothing is compiled then"),
]


def kernel_cases(dtype):
    """(kernel, its arguments' types, its constants) as gpu.py launches them, of tensors that are all of `dtype`."""
    import triton.language as tl

    norms, update, matrices, copies = (
        importlib.import_module(f"{gpu.__package__}.triton_{name}")
        for name in ("norms", "update", "matrices", "copies")
    )
    dtype, integer = getattr(tl, dtype), {"float32": tl.int32, "bfloat16": tl.int16}[dtype]
    of_block = {"table": "*i64", "tensor_of_block": "*i32", "stride": "i32"}
    of_tensor = {"table": "*i64", "stride": "i32"}
    wide, reduced = {"WIDE": tl.float32}, {"REDUCED": launch.REDUCED}
    read = {"G_DTYPE": dtype, "PREV_DTYPE": dtype}
    lanes = {"ALIGNED": True, "BLOCK": launch.BLOCK}
    bounds, rates = numbers("kappa", "max_norm"), numbers("beta1", "beta2", "lr", "max_norm")
    known = {"knowledge": "*i32"}
    results = floats("clip_factors", "step_sizes", "inverse_root_bias2")
    sums = {"sums_of_g": "*fp64", "sums_of_c": "*fp64"}
    clip, scales = floats("factor"), {"SCALES": True}
    measured = wide | read | scales | {"CORRECTED": True} | lanes
    yield norms.measure, of_block | bounds | floats("prev_norms") | sums | clip, measured
    yield (
        norms.judge,
        of_tensor | bounds | floats("prev_norms", "norms_of_g") | {"sums_of_g": "*fp64"} | known,
        wide | reduced,
    )
    rest = of_tensor | {"n": "i32"} | numbers("kappa") | known | {"sums_of_c": "*fp64"} | clip
    yield norms.measure_rest, rest, wide | read | scales | lanes | reduced
    yield norms.add_blocks, of_tensor | {"sums": "*fp64", "totals": "*fp64"}, reduced
    for spread in (False, True):
        flags = {"CORRECTED": True, "CLIPS": True, "SPREAD": spread, "RAISES": True, "IS_ADAMW": True}
        yield norms.prepare, of_tensor | rates | known | sums | results | floats("flag"), wide | reduced | flags
    for is_adamw in (True, False):
        compensated = dtype == tl.bfloat16
        flags = {"CORRECTED": True, "KEEPS_LAST_GRAD": True, "CLIPS": True, "IS_ADAMW": is_adamw}
        types = {"X_DTYPE": dtype, "M_DTYPE": dtype, "V_DTYPE": dtype, "COMPENSATED": compensated}
        hyperparameters = numbers("kappa", "beta1", "beta2", "eps", "gamma", "lr", "decay")
        yield (
            update.update,
            of_block | hyperparameters | results | floats("flag", "norms_of_g", "factor"),
            wide | read | scales | lanes | flags | types,
        )
    of_run = of_block | dict.fromkeys(("first_block", "first_tensor", "size"), "i32")
    lanes |= {"STACK_ALIGNED": True}
    flags = {"M_DTYPE": dtype, "CORRECTED": True, "KEEPS_LAST_GRAD": True, "CLIPS": True}
    momentum = of_run | numbers("kappa", "beta1", "gamma") | floats("clip_factors", "flag", "norms_of_g") | clip
    yield matrices.momentum, momentum | {"stack": "*bf16"}, wide | read | scales | lanes | flags
    move = of_run | numbers("rate", "decay") | floats("flag") | {"stack": "*bf16"}
    yield matrices.move, move, wide | lanes | {"X_DTYPE": dtype, "COMPENSATED": dtype == tl.bfloat16}
    del lanes["STACK_ALIGNED"]
    yield copies.swap, of_block, {"DTYPE": integer} | lanes
    yield copies.keep, of_block | floats("flag"), {"DTYPE": integer} | lanes
    yield norms.divide, of_block | floats("divisors"), wide | {"DTYPE": dtype} | lanes


def floats(*names):
    return dict.fromkeys(names, "*fp32")


def numbers(*names):
    return dict.fromkeys(names, "i64")


@functools.cache
def compiled(dtype, target):
    """(name, constants, what Triton makes of it) of every kernel, for GPUs of that kind."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    results = []
    for kernel, arguments, constants in kernel_cases(dtype):
        assert {*arguments, *constants} == {*kernel.arg_names}
        signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        device = GPUTarget(*target, 64 if target[0] == "hip" else 32)
        asm = triton.compile(source, target=device, options=launch.OPTIONS).asm
        results.append((kernel.fn.__name__, constants, asm))
    return results


def instructions(asm):
    """PTX, or AMD's assembly."""
    return asm["ptx"] if "ptx" in asm else asm["amdgcn"]


class TestCompiled:
    pytestmark = compiles

    @every_target
    @every_dtype
    def test_compiles_and_spills_nothing(self, dtype, target):
        for name, _, asm in compiled(dtype, target):
            assert "cubin" in asm or "hsaco" in asm, name
            if target[0] == "cuda":
                assert ".local" not in asm["ptx"], name
            else:
                assert re.search(r"vgpr_spill_count: +0\b", asm["amdgcn"]), name

    @pytest.mark.parametrize("target", [("cuda", 80), ("cuda", 90)], ids=str)
    @every_dtype
    def test_whole_blocks_move_in_16_bytes(self, dtype, target):
        for name, constants, asm in compiled(dtype, target):
            size = {"float32": 4, "bfloat16": 2}[dtype]
            per_thread = launch.BLOCK // (32 * launch.OPTIONS["num_warps"])
            pieces, of_stack = per_thread * size // 16, per_thread * 2 // 16
            if name == "update":  # x, g, g_{t−1}, m; v; compensation; all but g are written
                operands = 4 + constants["IS_ADAMW"] + constants["COMPENSATED"]
                loads, stores = operands * pieces, (operands - 1) * pieces
            elif name == "momentum":  # g, g_{t−1}, m; g_{t−1}, m, and the stack
                loads, stores = 3 * pieces, 2 * pieces + of_stack
            elif name == "move":  # x, compensation, and the stack
                loads, stores = (
                    (1 + constants["COMPENSATED"]) * pieces + of_stack,
                    (1 + constants["COMPENSATED"]) * pieces,
                )
            elif name in ("swap", "keep"):
                loads = stores = (2 if name == "swap" else 1) * pieces
            else:
                continue
            assert asm["ptx"].count("ld.global.v4.b32") == loads
            assert asm["ptx"].count("st.global.v4.b32") == stores
            if name not in ("swap", "keep") and (dtype == "bfloat16" or name == "momentum"):
                assert "cvt.rn.bf16" in asm["ptx"] and "cvt.rz" not in asm["ptx"]

    @pytest.mark.parametrize("target", [("cuda", 75), ("cuda", 80), ("cuda", 90)], ids=str)
    @every_dtype
    def test_float32_is_rounded_as_torch_rounds_it(self, dtype, target):
        """Every operation is rounded to nearest by itself: no fused product, no subnormal number made zero."""
        for name, constants, asm in compiled(dtype, target):
            found = set(re.findall(r"\b(?:sqrt|div|rcp|fma|mul|add|sub|ex2|lg2)(?:\.\w+)*\.f32", asm["ptx"]))
            assert found <= {f"{operation}.rn.f32" for operation in ("sqrt", "div", "mul", "add", "sub")}, name
            if name == "update":
                assert {"mul.rn.f32", "add.rn.f32"} < found
                assert ({"sqrt.rn.f32", "div.rn.f32"} <= found) == constants["IS_ADAMW"]

    @pytest.mark.parametrize("target", [("cuda", 80), ("cuda", 90)], ids=str)
    def test_four_blocks_of_threads_fit_a_multiprocessor(self, target, tmp_path):
        """Of 65,536 registers, in float32."""
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        for name, _, asm in compiled("float32", target):
            (tmp_path / "cubin").write_bytes(asm["cubin"])
            usage = subprocess.run([tool, "-res-usage", tmp_path / "cubin"], capture_output=True, text=True).stdout
            assert int(re.search(r"REG:(\d+)", usage)[1]) * 32 * launch.OPTIONS["num_warps"] * 4 <= 65536, name


@pytest.mark.slow
def test_a_cpu_does_not_import_triton():
    script = f"""
import sys, torch
from hf_mars.optim import MarsAdamW
param = torch.nn.Parameter(torch.ones(3, 2))
param.grad = torch.ones(3, 2)
MarsAdamW([param]).step()
assert "{gpu.__package__}.triton_update" not in sys.modules
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_a_device_without_triton_is_said(recwarn):
    gpu.kernels_for.cache_clear()
    assert gpu.kernels_for(torch.device("cuda")) is None
    gpu.kernels_for.cache_clear()
    assert "Triton kernels do not run on cuda" in str(recwarn.pop(UserWarning).message)
