"""adjust_lr_fn="match_rms_adamw": AdamW's learning rate carries over, as its root mean square does."""

import pytest
import torch
from helpers import assert_close, make_gradients, make_params, run_steps, values
from reference import AdamW

from hf_mars.optim import MarsAdamW
from hf_mars.optim.algorithm.correction import relative_update_rms

SETTINGS = [(0.95, 0.025), (0.9, 0.05), (0.9, 0.1), (0.98, 0.05), (0.9, 0.0), (0.5, 1.0)]


def rms_of_updates(optimizer_cls, steps=400, **settings):
    """Over the last steps, when averages have settled, of white noise."""
    (param,) = params = make_params([(64, 64)], dtype=torch.float32)
    optimizer = optimizer_cls(params, lr=1.0, weight_decay=0.0, **settings)
    squares = []
    for t, gradients in enumerate(make_gradients(params, steps, scales=(1e-3,))):
        before = param.detach().clone()
        run_steps(optimizer, params, [gradients])
        if t >= steps - 100:
            squares.append((param.detach() - before).square().mean())
    return torch.stack(squares).mean().sqrt().item()


@pytest.mark.parametrize(("beta1", "gamma"), SETTINGS)
def test_white_noise_moves_parameters_as_far_as_adamw_does(beta1, gamma):
    betas = (beta1, 0.99)
    expected = rms_of_updates(torch.optim.AdamW, betas=betas)
    adjusted = rms_of_updates(MarsAdamW, betas=betas, gamma=gamma, adjust_lr_fn="match_rms_adamw")
    original = rms_of_updates(MarsAdamW, betas=betas, gamma=gamma, adjust_lr_fn="original")
    assert adjusted == pytest.approx(expected, rel=0.02)
    assert original == pytest.approx(relative_update_rms(gamma, beta1) * expected, rel=0.02)


@pytest.mark.parametrize("composed", [{}, {"foreach": True}], ids=["default", "composed"])
def test_the_factor_is_on_the_adaptive_part_alone(composed):
    """Weight decay is the group's own, and so are 1d parameters: they get AdamW as it is."""
    matrix, vector = params = make_params([(6, 5), (4,)], dtype=torch.float32)
    betas, gamma, lr, decay = (0.9, 0.99), 0.05, 0.01, 0.1
    r = relative_update_rms(gamma, betas[0])
    expected = [
        AdamW(matrix, eta=lr / r, lam=decay * r, betas=betas, gamma=gamma),
        AdamW(vector, eta=lr, lam=decay, betas=(0.9, 0.95), gamma=0.0, max_norm=None),
    ]
    optimizer = MarsAdamW(
        params,
        lr=lr,
        betas=betas,
        weight_decay=decay,
        gamma=gamma,
        adjust_lr_fn="match_rms_adamw",
        max_norm=1.0,
        **composed,
    )
    gradients = make_gradients(params, 5)
    run_steps(optimizer, params, gradients)
    for step in gradients:
        for reference, g in zip(expected, step, strict=True):
            reference.step(g)
    assert_close(values(params), [reference.x for reference in expected], 1e-5)


def test_exact_mode_needs_no_factor():
    finals = []
    for adjust_lr_fn in ("original", "match_rms_adamw"):
        params = make_params([(6, 5)])
        optimizer = MarsAdamW(params, lr=0.01, gamma=0.5, exact=True, adjust_lr_fn=adjust_lr_fn)
        for t in range(3):
            with optimizer.previous_point():
                ((t + 1) * params[0] ** 2).sum().backward()
            ((t + 1) * params[0] ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(values(params)[0])
    assert torch.equal(*finals)
