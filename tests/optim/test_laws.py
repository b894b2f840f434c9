"""The paper's connections to existing optimizers: at certain settings MARS is AdamW, Lion or Muon.

Lion and Muon agree with MARS on every sequence whose first gradient is zero. Otherwise c_1 = g_1, where they start
from g_0 = 0, leaves a difference of -gamma beta1^t g_1 in the momentum. All comparisons are in float64; 1e-12 is
relative to the largest entry of a tensor. The two laws of the exact form belong to the tests of that form.
"""

import pytest
import reference
import torch
from helpers import METHODS, assert_close, assert_equal, make_gradients, make_params, run_steps

from hf_mars.optim import MarsAdamW, MarsLion, MarsShampoo

STEPS = 40
MATRICES = [(7, 4), (4, 7), (5, 5)]


def gradients_of(params, *, first_is_zero=False, steps=STEPS):
    gradients = make_gradients(params, steps)
    if first_is_zero:
        gradients[0] = [torch.zeros_like(p) for p in params]
    return gradients


# --- AdamW


# The kernel is stated, so that the two run the same one and agree bit for bit.
@pytest.mark.parametrize("switch", [{"foreach": True}, {"foreach": False, "fused": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("betas", [(0.95, 0.99), (0.9, 0.999)], ids=str)
def test_adamw(betas, dtype, switch):
    """gamma = 0 without the clip is torch.optim.AdamW: matrices at lr with betas, the rest at lr_1d with betas_1d."""
    ours, theirs = make_params(dtype=dtype), make_params(dtype=dtype)
    gradients = make_gradients(ours, STEPS, scales=(1.0, 10.0, 0.1))
    mars = MarsAdamW(
        ours,
        lr=0.02,
        betas=betas,
        weight_decay=0.1,
        gamma=0.0,
        max_norm=None,
        lr_1d=0.007,
        betas_1d=(0.8, 0.9),
        **switch,
    )
    groups = [
        {"params": [p for p in theirs if p.ndim >= 2], "lr": 0.02, "betas": betas},
        {"params": [p for p in theirs if p.ndim < 2], "lr": 0.007, "betas": (0.8, 0.9)},
    ]
    adamw = torch.optim.AdamW(groups, weight_decay=0.1, **switch)
    assert_equal(run_steps(mars, ours, gradients), run_steps(adamw, theirs, gradients))


# --- Lion


def lion_as_mars(betas):
    """beta1 := Lion's beta2 and gamma = 1 - beta1(Lion) / beta2(Lion)."""
    b1, b2 = betas
    return {"betas": (b2, 0.99), "gamma": 1 - b1 / b2}


def test_lions_defaults_are_one_eleventh():
    assert lion_as_mars((0.9, 0.99))["gamma"] == pytest.approx(1 / 11, rel=1e-12)


# With the clip off, and with a clip too wide to be active: one buffer, and two.
NO_CLIP = pytest.mark.parametrize("max_norm", [None, 1e30])


@NO_CLIP
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98)], ids=str)
def test_lion_after_a_zero_gradient(betas, max_norm):
    params = make_params(MATRICES)
    gradients = gradients_of(params, first_is_zero=True)
    lions = [reference.PlainLion(p, eta=0.02, lam=0.1, betas=betas) for p in params]
    mars = MarsLion(params, lr=0.02, weight_decay=0.1, max_norm=max_norm, **lion_as_mars(betas))
    for t, step in enumerate(gradients):
        run_steps(mars, params, [step])
        signs = [lion.step(g) for lion, g in zip(lions, step, strict=True)]
        assert t == 0 or all((u.abs() > 1e-9).all() for u in signs)  # no sign is left to rounding
        assert_close(params, [lion.x for lion in lions], 1e-12)


def test_lions_momentum_otherwise():
    """m_t differs from Lion's by exactly -gamma beta1^t g_1, and so the signs agree in the end."""
    betas = (0.9, 0.95)
    law = lion_as_mars(betas)
    beta1, gamma = law["betas"][0], law["gamma"]
    params = make_params(MATRICES)
    gradients = gradients_of(params, steps=300)
    lions = [reference.PlainLion(p, eta=0.02, betas=betas) for p in params]
    mars = MarsLion(params, lr=0.02, max_norm=1e30, **law)
    for t, step in enumerate(gradients, start=1):
        before = [p.detach().clone() for p in params]
        run_steps(mars, params, [step])
        for p, x, lion, g, g1 in zip(params, before, lions, step, gradients[0], strict=True):
            u = lion.step(g)
            difference = mars.state[p]["exp_avg"] - u
            expected = -gamma * beta1**t * g1
            # rounding is relative to u, which does not decay
            assert (difference - expected).abs().max() < 1e-13 * u.abs().max()
            if t > 200:  # 0.95^200 = 3.5e-5
                assert_close([x - p.detach()], [0.02 * u.sign()], 1e-12)


# --- Muon


@NO_CLIP
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("mu", [0.95, 0.9])
def test_muon_after_a_zero_gradient(mu, adjust_lr_fn, max_norm, monkeypatch):
    """gamma = 1 - mu, beta1 = mu. torch.optim.Muon iterates in bfloat16: here it gets a float64 Newton-Schulz."""

    def newton_schulz(matrix, coefficients, steps, eps):
        assert coefficients == (3.4445, -4.7750, 2.0315)
        return reference.newton_schulz(matrix, steps)

    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz)
    ours, theirs = make_params(MATRICES), make_params(MATRICES)
    gradients = gradients_of(ours, first_is_zero=True)
    common = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn}
    mars = MarsShampoo(ours, gamma=1 - mu, betas=(mu, 0.99), max_norm=max_norm, **common)
    muon = torch.optim.Muon(theirs, momentum=mu, nesterov=True, **common)
    plain = [reference.PlainMuon(p, eta=0.02, lam=0.1, mu=mu, adjust_lr_fn=adjust_lr_fn) for p in theirs]
    assert_close(run_steps(mars, ours, gradients), run_steps(muon, theirs, gradients), 1e-12)
    for step in gradients:
        for p, g in zip(plain, step, strict=True):
            p.step(g)
    assert_close(ours, [p.x for p in plain], 1e-12)


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_muon_as_torch_ships_it(adjust_lr_fn):
    """Without the replacement the updates agree within bfloat16: 2^-9 a rounding, a few dozen roundings in five
    iterations, which carry them by up to 3.4 each. Muon of another momentum is farther away than that.
    """
    params = make_params(MATRICES)
    gradients = gradients_of(params, first_is_zero=True, steps=10)
    moves = []
    for name in ("mars", "muon", "other"):
        p = make_params(MATRICES)
        before = [x.detach().clone() for x in p]
        common = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn}
        if name == "mars":
            optimizer = MarsShampoo(p, gamma=0.05, betas=(0.95, 0.99), max_norm=None, **common)
        else:
            optimizer = torch.optim.Muon(p, momentum=0.95 if name == "muon" else 0.5, **common)
        after = run_steps(optimizer, p, gradients)
        moves.append([a - b for a, b in zip(after, before, strict=True)])
    for mars, muon, other in zip(*moves, strict=True):
        assert (mars - muon).norm() < 0.03 * muon.norm()
        assert (mars - other).norm() > 0.1 * muon.norm()


# --- The momentum, and what needs no stored gradient


@pytest.mark.parametrize("gamma", [0.0, 0.025, 0.5])
@pytest.mark.parametrize("cls", [MarsAdamW, MarsLion, MarsShampoo])
def test_momentum_is_one_average_and_the_gradient(cls, gamma):
    """m_t = (1 - gamma) e_t + gamma g_t,  e_t = beta1 e_{t-1} + (1 - beta1) g_t,  e_0 = -gamma / (1 - gamma) g_1."""
    params = make_params(MATRICES)
    gradients = gradients_of(params)
    beta1 = 0.95
    optimizer = cls(params, lr=0.0, gamma=gamma, betas=(beta1, 0.99), max_norm=None if cls is MarsAdamW else 1e30)
    averages = [-gamma / (1 - gamma) * g for g in gradients[0]]
    for step in gradients:
        run_steps(optimizer, params, [step])
        averages = [beta1 * e + (1 - beta1) * g for e, g in zip(averages, step, strict=True)]
        expected = [(1 - gamma) * e + gamma * g for e, g in zip(averages, step, strict=True)]
        assert_close([optimizer.state[p]["exp_avg"] for p in params], expected, 1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.025, 0.5, 1.0])
@pytest.mark.parametrize("method", ["mars_lion", "mars_shampoo", "mars_m"])
def test_one_buffer_equals_two(method, gamma):
    """Without the clip, and with a clip too wide to be active: the same weights from half of the state."""
    cls, keywords, _ = METHODS[method]
    finals = []
    for max_norm in (None, 1e30):
        params = make_params(MATRICES)
        optimizer = cls(params, lr=0.02, weight_decay=0.1, gamma=gamma, max_norm=max_norm, **keywords)
        finals.append(run_steps(optimizer, params, gradients_of(params)))
    # gamma = 1 has kappa = 19, and Newton-Schulz multiplies a rounding of c_t by up to 500
    assert_close(*finals, 1e-12 if gamma < 1 else 1e-11)


@pytest.mark.parametrize("gamma", [0.025, 1.0])
def test_a_constant_gradient_needs_no_correction(gamma):
    """c = g, and the bias-corrected momentum is g itself."""
    params = make_params(MATRICES)
    constant = make_gradients(params, 1) * STEPS
    optimizer = MarsAdamW(params, lr=0.01, gamma=gamma, betas=(0.95, 0.99))
    run_steps(optimizer, params, constant)
    assert_close([optimizer.state[p]["exp_avg"] / (1 - 0.95**STEPS) for p in params], constant[0], 1e-12)
