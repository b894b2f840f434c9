"""The two compiled executions of a step, on CPUs and on GPUs: where they are, and what their tests ask both."""

import dataclasses
from types import ModuleType

import pytest
import torch
from helpers import METHODS, make, make_gradients, make_params, run_steps, values

from hf_mars.optim.kernels import cpu, gpu

FUSED = [method for method, (_, _, update) in METHODS.items() if update in ("adamw", "lion")]
EVERY_FUSED = pytest.mark.parametrize("method", FUSED)
COMPOSED = {"foreach": True}  # of torch's kernels
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


@dataclasses.dataclass(frozen=True)
class Execution:
    """A module whose `step` takes a step, the device and dtypes of what it takes, and shapes that are hard for it."""

    module: ModuleType
    device: str
    dtypes: tuple
    shapes: list

    def params(self, shapes=None, dtype=torch.float32):
        made = make_params(shapes or self.shapes, dtype=dtype)
        return [torch.nn.Parameter(p.detach().to(self.device)) for p in made]

    def gradients(self, params, steps, **options):
        return [[g.to(self.device) for g in step] for step in make_gradients(params, steps, **options)]


EXECUTIONS = {
    # Nothing, one element, less and more than the vector loops take at once, and more than is updated at a time (BLOCK
    # in _cpu.c), for each of three threads.
    "cpu": Execution(
        cpu, "cpu", (torch.float32,), [(0, 3), (1, 1), (3, 7), (4097, 5), (1000, 900), (70, 64), (8, 3, 5)]
    ),
    # Nothing, one element, less than a block, whole blocks, and more than a block, not whole.
    "gpu": Execution(
        gpu,
        "cpu" if gpu.is_interpreted() else "cuda",
        (torch.float32, torch.float64),
        [(0, 3), (1, 1), (3, 7), (64, 64), (50, 90)],
    ),
}
NEEDS_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() and not gpu.is_interpreted(), reason="needs a GPU, or TRITON_INTERPRET=1"
)
NEEDS_CPU = pytest.mark.skipif(gpu.is_interpreted(), reason="Triton's interpreter takes the tensors of the CPU")
ON_CPU, ON_GPU = pytest.param("cpu", marks=NEEDS_CPU), pytest.param("gpu", marks=NEEDS_GPU)
ON_CPU_THREADS = pytest.param("cpu, 3 threads", marks=[NEEDS_CPU, pytest.mark.slow])
EVERY_EXECUTION = pytest.mark.parametrize("execution", [ON_CPU, ON_GPU], indirect=True)
EVERY_EXECUTION_AND_THREADS = pytest.mark.parametrize("execution", [ON_CPU, ON_CPU_THREADS, ON_GPU], indirect=True)


def assert_mostly_close(actual, expected, tolerance, method):
    """Lion's sign makes a whole step of a rounding error, where a momentum is next to zero: one in 10,000 may."""
    for a, e in zip(actual, expected, strict=True):
        if a.numel():
            differ = (a.double() - e.double()).abs() > tolerance * e.double().abs().max()
            assert differ.sum().item() <= (1e-4 * a.numel() if method == "mars_lion" else 0)


def short_and_clipped(execution, method, steps, forget=lambda optimizer: None):
    """Final values after short gradients, then one that is clipped, which the last norm did not announce, then one
    that it did, …; `forget` is called after each step."""
    params = execution.params()
    optimizer = make(method, params, lr=0.01, gamma=0.5)
    for gradients in execution.gradients(params, steps, scales=(1e-5, 1e-5, 3.0, 3.0, 1e-5)):
        run_steps(optimizer, params, [gradients])
        forget(optimizer)
    return values(params)
