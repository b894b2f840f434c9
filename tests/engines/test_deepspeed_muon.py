"""docs/distributed.md, for those who come from DeepSpeed's Muon: its update is mars_shampoo's with other names."""

import math

import pytest
import torch
from launch_helpers import NEEDS_DEEPSPEED

from hf_mars import MarsShampoo

pytestmark = NEEDS_DEEPSPEED

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (7, 7)}


@pytest.mark.parametrize("momentum", [0.95, 0.9])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_deepspeeds_muon_is_mars_shampoo(shape, momentum, monkeypatch):
    """γ = 1 − β and no clip; from a first gradient of zero on, for the paper has c_1 = g_1 and Muon (1 + β) g_1."""
    from deepspeed.runtime.zero.muon import original_muon

    monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda method="gram": torch.float32)
    lr, weight_decay = 0.02, 0.1
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.zeros(shape), *torch.randn(8, *shape, generator=generator)]
    param = torch.nn.Parameter(start.clone())
    mars = MarsShampoo(
        [param], lr=lr, weight_decay=weight_decay, betas=(momentum, 0.99), gamma=1 - momentum, max_norm=None
    )
    expected, buffer = start.clone(), torch.zeros(shape)
    with torch.compiler.set_stance("force_eager"):
        for grad in gradients:
            param.grad = grad.clone()
            mars.step()
            update = original_muon.muon_update(grad.clone(), buffer, beta=momentum)
            expected.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)
            # Newton–Schulz by Gram's matrix, and 1e-7 beside the norm: the same to rounding, which it multiplies.
            torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-4 * lr)
    assert math.isclose(buffer.norm().item(), mars.state[param]["exp_avg"].norm().item(), rel_tol=1e-5)
