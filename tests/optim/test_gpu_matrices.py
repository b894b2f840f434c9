"""MARS-Shampoo in the Triton kernels. It needs a GPU, or TRITON_INTERPRET=1, with which test_triton.py runs this."""

import math

import pytest
import torch
from helpers import assert_close, assert_equal, make, run_steps, values
from kernel_helpers import COMPOSED, EXECUTIONS, NEEDS_GPU, gpu

from hf_mars.optim import MarsShampoo, skipping
from hf_mars.optim.algorithm import newton_schulz
from hf_mars.optim.kernels import matrices

pytestmark = NEEDS_GPU

GPU = EXECUTIONS["gpu"]
# Tall, wide, square, a stack, a convolution; of one shape twice, not next to each other; more than a block; nothing.
SHAPES = [(7, 4), (4, 7), (5, 5), (7, 4), (3, 4, 6), (6, 3, 2, 2), (50, 90), (0, 3)]
SETTINGS = {
    "one tensor": {"max_norm": None},
    "clipped": {"max_norm": 1.0},
    "plain": {"gamma": 0.0, "max_norm": None},
    "plain, clipped": {"gamma": 0.0, "max_norm": 1.0},
}
EVERY_SETTING = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
EVERY_METHOD = pytest.mark.parametrize("method", ["mars_shampoo", "mars_m"])


@pytest.fixture
def execution():
    return GPU


def train(method, dtype=torch.float64, steps=4, layouts=("out_in",), shapes=tuple(SHAPES), **settings):
    """Final values and states, of what has elements."""
    params = GPU.params(shapes, dtype)
    groups = [{"params": params[i :: len(layouts)], "layout": layout} for i, layout in enumerate(layouts)]
    optimizer = make(method, groups, weight_decay=0.1, **settings)
    run_steps(optimizer, params, GPU.gradients(params, steps, scales=(1e-3, 1.0)))
    finals = [*values(params), *(t for p in params for t in optimizer.state[p].values())]
    return [t for t in finals if t.numel()]


@EVERY_SETTING
@EVERY_METHOD
def test_equals_the_composition(method, settings, calls):
    """In float64, in which Newton–Schulz computes then; after gradients that are clipped and such that are not."""
    expected = train(method, **settings, **COMPOSED)
    assert not calls
    finals = train(method, **settings)
    assert len(calls) == 4
    assert_close(finals, expected, 1e-12)


@EVERY_METHOD
def test_layouts_have_launches_of_their_own(method, calls):
    """GPT-2's projections are stored the other way round: another scale."""
    settings = {"layouts": ("out_in", "in_out"), "shapes": SHAPES[:-1]}
    expected = train(method, **settings, **COMPOSED)
    assert_close(train(method, **settings), expected, 1e-12)
    assert len(calls) == 8


def test_exact_mode(calls):
    finals = []
    for composed in (COMPOSED, {}):
        params = GPU.params(SHAPES, torch.float64)
        optimizer = make("mars_m", params, exact=True, gamma=0.5, max_norm=1.0, **composed)
        for gradients in GPU.gradients(params, 3):
            with optimizer.previous_point():
                for p, g in zip(params, gradients, strict=True):
                    p.grad = 0.9 * g
            run_steps(optimizer, params, [gradients])
        finals.append([p for p in values(params) if p.numel()])
    assert len(calls) == 3
    assert_close(*finals, 1e-12)


@EVERY_SETTING
def test_stacks_of_few_matrices_are_those_of_many(settings, monkeypatch):
    runs = []
    move = matrices.MatrixLaunch.move
    monkeypatch.setattr(
        matrices.MatrixLaunch, "move", lambda self, run, *args: (runs.append(run.matrices), move(self, run, *args))
    )
    expected = train("mars_m", steps=1, **settings)
    assert sorted(runs) == [1] * 5 + [2]  # of seven matrices that are not empty, two are of one shape
    runs.clear()
    for name in ("STACKED", "STACKED_ON_CPU"):
        monkeypatch.setattr(newton_schulz, name, 1)
    assert_close(train("mars_m", steps=1, **settings), expected, 1e-12)
    assert runs == [1] * 7


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_raised_flag_changes_nothing(bad, calls, monkeypatch):
    """Where the host does not know what a norm is."""
    monkeypatch.setattr(skipping, "reads_are_free", lambda tensors: False)
    params = GPU.params(SHAPES)
    optimizer = make("mars_m", params, max_norm=1.0)
    good = GPU.gradients(params, 3, scales=(1e-3, 1.0))
    run_steps(optimizer, params, good[:2])
    before = [*values(params), *(t.clone() for p in params for t in optimizer.state[p].values())]
    spoilt = [g.clone() for g in good[2]]
    spoilt[6].view(-1)[-1] = bad
    run_steps(optimizer, params, [spoilt])
    assert_equal([*values(params), *(t for p in params for t in optimizer.state[p].values())], before)
    assert optimizer.skipped_steps == 1 and len(calls) == 3
    run_steps(optimizer, params, good[2:])
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=False) if p.numel())


@EVERY_METHOD
def test_bfloat16_parameters_lose_no_update(method, calls):
    """x + compensation follows float32; the momentum is rounded to bfloat16 in both."""
    finals = []
    for dtype, settings in ((torch.bfloat16, {"state_dtype": "float32"}), (torch.float32, {})):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in GPU.params(SHAPES, torch.bfloat16)]
        optimizer = make(method, params, lr=1e-4, max_norm=None, **settings)
        gradients = GPU.gradients(GPU.params(SHAPES, torch.bfloat16), 6)
        run_steps(optimizer, params, [[g.to(dtype) for g in step] for step in gradients])
        rests = [optimizer.state[p].get("compensation", torch.zeros_like(p)) for p in params]
        finals.append([p.detach().float() + r.float() for p, r in zip(params, rests, strict=True) if p.numel()])
    assert len(calls) == 12
    assert_close(*finals, 1e-4)


def test_what_it_does_not_take_is_composed(calls):
    """A singular value decomposition, and matrices that ranks share out."""
    for settings in ({"ns_steps": None}, {"process_group": Two()}):
        params = GPU.params([(4, 3)])
        taken, _, why_not = gpu.split(batch_of(MarsShampoo(params, **settings), params))
        assert taken is None and why_not in ("ns_steps=None", "matrices are shared out among ranks")
    assert not calls


class Two:
    """A stand-in for a process group of two."""

    def size(self):
        return 2


def batch_of(optimizer, params):
    from hf_mars.optim.batch import collect

    for p in params:
        p.grad = torch.ones_like(p)
    where = (optimizer._forms, optimizer._seen, optimizer._previous_point.gradients, optimizer._originals, [])
    others = {"adjusts_lr": False, "replicas": optimizer.process_group}
    (batch,) = collect(optimizer.param_groups, optimizer.state, *where, **others)
    return batch
