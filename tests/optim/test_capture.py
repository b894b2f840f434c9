"""CUDA graphs: what a replay would repeat though it should change is refused when the graph is made; a tensor as the
learning rate, which a replay reads anew, gives the steps of a number."""

import pytest
import torch
from helpers import EVERY_METHOD, assert_close, make, make_gradients, make_params, run_steps, values

from hf_mars.optim import MarsAdamW, MarsLion
from hf_mars.optim.host import check_captured

with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"lr": 0.01}, "every replay would take lr=0.01"),
        ({"lr": torch.tensor(0.5)}, r"every replay would take lr=0.5.*device"),
        ({"foreach": True}, r"foreach=True, fused=False the host counts"),
        ({"fused": False}, r"foreach=None, fused=False the host counts"),
    ],
    ids=str,
)
def test_what_replays_would_freeze_is_refused(settings, says, monkeypatch):
    """Before anything changes. The device is a stand-in for a GPU on which work is captured."""
    monkeypatch.setattr("hf_mars.optim.host.is_captured", lambda tensor: True)
    param = torch.nn.Parameter(torch.zeros(4, 3, device="meta"))
    param.grad = torch.zeros_like(param)
    optimizer = MarsAdamW([param], **{"lr": torch.zeros((), device="meta"), **settings})
    with pytest.raises(RuntimeError, match=f"(?s){says}"):
        optimizer.step()
    assert not optimizer.state
    check_captured(MarsAdamW([param], lr=torch.zeros((), device="meta")).param_groups)
    lion = MarsLion([param], lr=torch.zeros((), device="meta"), fused=False)  # counts no steps
    lion.step()


def test_what_has_no_gradient_is_not_asked(monkeypatch):
    monkeypatch.setattr("hf_mars.optim.host.is_captured", lambda tensor: True)
    MarsAdamW([torch.nn.Parameter(torch.zeros(4, 3))], lr=0.01).step()


@pytest.mark.parametrize(
    "settings", [{}, {"max_norm": None}, {"fused": False}, {"exact": True, "gamma": 0.0}], ids=str
)
@EVERY_METHOD
def test_a_tensor_is_the_number_in_it(method, settings):
    finals = []
    for lr in (0.02, torch.tensor(0.02, dtype=torch.float64)):
        params = make_params()
        optimizer = make(method, params, lr=lr, weight_decay=0.1, **settings)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        finals.append(run_steps(optimizer, params, make_gradients(params, 3)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):  # as a scheduler does it
            group["lr"].fill_(2 * rate) if isinstance(lr, torch.Tensor) else group.update(lr=2 * rate)
        finals[-1] += run_steps(optimizer, params, make_gradients(params, 2, seed=5))
    assert_close(*finals, 1e-12)


@pytest.mark.parametrize("lr", [torch.ones(1), torch.ones(2), torch.tensor(1)], ids=str)
def test_other_tensors_are_refused(lr):
    with pytest.raises(ValueError, match="lr must be a number >= 0, got tensor"):
        MarsAdamW(make_params(), lr=lr)


@with_gpu
@pytest.mark.parametrize("max_norm", [1.0, None])
@EVERY_METHOD
def test_replays_are_steps(method, max_norm):
    """Ten replays, each with other gradients and another learning rate, against the same steps without a graph."""
    finals = []
    for captured in (False, True):
        params = [torch.nn.Parameter(p.detach().cuda()) for p in make_params(dtype=torch.float32)]
        lr = torch.tensor(0.0, device="cuda")
        optimizer = make(method, params, lr=lr, lr_1d=None, max_norm=max_norm)
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()  # makes the states
        graph = torch.cuda.CUDAGraph()
        if captured:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                optimizer.step()
        for t, gradients in enumerate(make_gradients(params, 10, scales=(0.01, 1.0))):
            for group in optimizer.param_groups:
                group["lr"].fill_(1e-3 * (t + 1))
            for param, gradient in zip(params, gradients, strict=True):
                param.grad.copy_(gradient)
            graph.replay() if captured else optimizer.step()
        finals.append(values(params))
    (assert_close(*finals, 1e-5) if method in ("mars_adamw", "mars_lion") else assert_close(*finals, 2e-2))
