"""On accelerators step() never waits for the device. Tensors on "meta" have no values that anything could wait for;
where there is a GPU, torch itself looks for synchronisation."""

import sys
import types

import pytest
import torch
from helpers import EVERY_METHOD, assert_close, make, make_gradients, make_params, run_steps
from torch.utils._python_dispatch import TorchDispatchMode

from hf_mars.optim import MarsAdamW, MarsLion
from hf_mars.optim.algorithm.lion import PIECE_ON_ACCELERATORS
from hf_mars.optim.sharding import norms
from hf_mars.optim.skipping import Skip

SETTINGS = {
    "the default": {},
    "without clip": {"max_norm": None},
    "exact": {"exact": True},
    "half the state": {"state_dtype": "bfloat16", "last_grad_dtype": "bfloat16"},
}
SHAPES = [(8, 4), (4, 8), (4,)]

with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
every_case = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make_on(device, method, dtype, settings):
    params = [torch.nn.Parameter(p.detach().to(device)) for p in make_params(SHAPES, dtype=dtype)]
    return params, make(method, params, weight_decay=0.1, **settings)


def set_gradients(params, optimizer, exact):
    """Also at the previous point, whatever it is: values do not matter here."""
    if exact:
        with optimizer.previous_point():
            for p in params:
                p.grad = torch.ones_like(p)
    for p in params:
        p.grad = torch.ones_like(p)


def test_a_meta_tensor_has_no_value_to_read():
    with pytest.raises(RuntimeError):
        torch.zeros((), device="meta").item()


@every_case
@every_dtype
@EVERY_METHOD
def test_step_reads_no_value(method, dtype, settings):
    params, optimizer = make_on("meta", method, dtype, settings)
    for _ in range(3):
        set_gradients(params, optimizer, "exact" in settings)
        optimizer.step()
        optimizer.zero_grad()


def test_without_fused_kernels_torch_chooses_foreach_as_for_its_own_adamw(monkeypatch):
    """Where a device has fast lists, as GPUs do; its loop over tensors takes a dozen launches for each."""
    taken = []
    in_torch = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(in_torch, "_multi_tensor_adam", lambda params, *_, **__: taken.append(len(params)))
    chooses = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(chooses, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])
    for cls, settings in ((torch.optim.AdamW, {}), (MarsAdamW, {"fused": False})):
        params = make_params([(4, 3), (3, 5)])
        run_steps(cls(params, **settings), params, make_gradients(params, 1))
    assert taken == [2, 2]


class Largest(TorchDispatchMode):
    """The most elements that one call of a function returned."""

    def __init__(self):
        super().__init__()
        self.elements = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, (list, tuple)):
            name = function.overloadpacket.__name__
            self.elements[name] = max(self.elements.get(name, 0), sum(t.numel() for t in result))
        return result


class Words(TorchDispatchMode):
    """Elements that are read and written, of tensors of at least `least` elements, by the schemas of functions; and
    how many functions take tensors."""

    def __init__(self, least):
        super().__init__()
        self.least, self.count, self.launches = least, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.overloadpacket.__name__ == "empty_like":
            return result
        arguments = {a.name: a for a in function._schema.arguments}
        given = dict(zip(arguments, args, strict=False)) | (kwargs or {})
        changes = False
        for name, value in given.items():
            writes = arguments[name].alias_info is not None and arguments[name].alias_info.is_write
            changes |= writes
            only_writes = writes and (name == "out" or function.overloadpacket.__name__ in ("copy_", "_foreach_copy_"))
            # AdamW's gradients are only written to with grad_scale.
            also_writes = writes and not only_writes and name != "grads"
            self.count += self.large(value) * (1 + also_writes)
        self.count += 0 if changes else self.large(result)
        values = [t for value in given.values() for t in (value if isinstance(value, (list, tuple)) else [value])]
        self.launches += any(map(torch.is_tensor, values))
        return result

    def large(self, value):
        tensors = value if isinstance(value, (list, tuple)) else [value]
        return sum(t.numel() for t in tensors if torch.is_tensor(t) and t.numel() >= self.least)


@pytest.mark.parametrize("max_norm, words", [(None, 12), (1.0, 20)])
def test_words_that_the_composed_step_moves(max_norm, words):
    """As docs/performance.md says: 3 for c_t, 7 for AdamW, 2 for the copy of g_t; with the clip 1 and 2,
    and 5 more to leave g_{t−1} as it is where the step is skipped, which the host does not know."""
    param = torch.nn.Parameter(torch.empty(10, 100, device="meta"))
    optimizer = MarsAdamW([param], max_norm=max_norm)
    for _ in range(2):
        param.grad = torch.empty_like(param)
        with Words(param.numel()) as moved:
            optimizer.step()
    assert moved.count == words * param.numel()


def test_words_and_launches_of_exact_mode_by_torchs_kernels():
    """To x_{t−1} and back 6 words each, and 2 to keep x_t, for any number of parameters; in pieces of 16 million
    elements. The Triton kernels take 10: test_gpu_kernels.py, test_triton.py."""
    for tensors in (2, 30):
        params = [torch.nn.Parameter(torch.empty(10, 100, device="meta")) for _ in range(tensors)]
        optimizer = MarsAdamW(params, exact=True)
        for _ in range(2):
            set_gradients(params, optimizer, exact=True)
            optimizer.step()
        with Words(1000) as moved, optimizer.previous_point():
            pass
        assert moved.count == 12 * 1000 * tensors and moved.launches == 6
        with Words(1000) as moved:
            optimizer._previous_point.keep(optimizer.param_groups, optimizer.state, Skip())
        assert moved.count == 2 * 1000 * tensors and moved.launches == 1


def test_norms_of_tensors_that_are_spread_over_ranks_take_few_launches(monkeypatch):
    """For any number of tensors, since their squares are added up, and roots taken, of a vector."""
    part = types.SimpleNamespace(sums_over=("ranks",))
    monkeypatch.setattr(norms, "exchange_device", lambda ranks, device: device)
    monkeypatch.setattr(norms.dist, "all_reduce", lambda tensor, group: None)
    for number in (2, 30):
        tensors = [torch.empty(10, 100, device="meta") for _ in range(number)]
        with Words(0) as moved:
            results = norms.norms_of_wholes(tensors, [part] * number)
        assert len(results) == number and moved.launches <= 8


@pytest.mark.parametrize("max_norm", [1e6, None])
def test_lion_holds_the_signs_of_a_piece_of_the_parameters(max_norm):
    piece = PIECE_ON_ACCELERATORS
    params = [torch.nn.Parameter(torch.empty(n, 1024, device="meta")) for n in [piece // 4096] * 9 + [piece // 256]]
    optimizer = MarsLion(params, gamma=0.5, max_norm=max_norm)
    for param in params:
        param.grad = torch.empty_like(param)
    with Largest() as largest:
        optimizer.step()
    assert largest.elements["_foreach_sign"] == piece
    if max_norm is None:  # with the clip, c_t is a copy of its own while the step may still be skipped
        assert largest.elements["_foreach_lerp"] == piece


@with_gpu
@every_case
@every_dtype
@EVERY_METHOD
def test_step_does_not_synchronize(method, dtype, settings):
    params, optimizer = make_on("cuda", method, dtype, settings)
    for _ in range(3):
        set_gradients(params, optimizer, "exact" in settings)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()


@with_gpu
@pytest.mark.parametrize("max_norm", [1.0, None])
@EVERY_METHOD
def test_a_gpu_takes_the_steps_of_a_cpu(method, max_norm):
    """float64, where Newton-Schulz is computed in the same precision on both."""
    finals = []
    for device in ("cpu", "cuda"):
        params, optimizer = make_on(device, method, torch.float64, {"max_norm": max_norm, "gamma": 0.2})
        gradients = [[g.to(device) for g in step] for step in make_gradients(params, 5)]
        finals.append([p.cpu() for p in run_steps(optimizer, params, gradients)])
    assert_close(*finals, 1e-10)
