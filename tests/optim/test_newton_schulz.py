"""Newton-Schulz: an odd polynomial in the singular values, five times over; and the exact form U V^T."""

import pytest
import reference
import torch
from helpers import assert_close, make_gradients, make_params

from hf_mars.optim import MarsShampoo
from hf_mars.optim.algorithm import newton_schulz as module
from hf_mars.optim.algorithm.newton_schulz import newton_schulz, orthogonalize_svd

SHAPES = pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1), (1, 1)], ids=str)
FORMS = pytest.mark.parametrize("orthogonalize", [newton_schulz, orthogonalize_svd])


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_singular_values(sigma, rows, columns):
    k = len(sigma)
    u, v = torch.linalg.qr(random(rows, k, seed=1)).Q, torch.linalg.qr(random(columns, k, seed=2)).Q
    return u, torch.tensor(sigma, dtype=torch.float64), v


@SHAPES
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_equals_the_reference(shape, steps):
    m = random(*shape)
    assert_close([newton_schulz(m, steps=steps)], [reference.newton_schulz(m, steps)], 1e-12)


@pytest.mark.parametrize("rows, columns", [(8, 5), (5, 8), (5, 5)])
@pytest.mark.parametrize("sigma", [[1.0, 0.8, 0.5, 0.3, 0.2], [3.0] * 5, [9.0, 7.0, 2.0, 1.0, 0.6]], ids=str)
def test_acts_on_the_singular_values_alone(rows, columns, sigma):
    """U diag(sigma) V^T becomes U diag(p(p(p(p(p(sigma / ||sigma||)))))) V^T with p(s) = a s + b s^3 + c s^5."""
    u, s, v = with_singular_values(sigma, rows, columns)
    matrix = u @ s.diag() @ v.T
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert_close([newton_schulz(matrix)], [u @ s.diag() @ v.T], 1e-12)
    assert 0.68 < s.min() and s.max() < 1.14  # as near to one as the polynomial gets
    assert_close([orthogonalize_svd(matrix)], [u @ v.T], 1e-12)


@SHAPES
def test_svd_form_is_exact(shape):
    q = orthogonalize_svd(random(*shape))
    k = min(shape)
    gram = q.T @ q if shape[0] >= shape[1] else q @ q.T
    assert q.shape == shape
    assert_close([gram], [torch.eye(k, dtype=torch.float64)], 1e-12)
    # the nearest orthogonal matrix: <Q, M> is the sum of the singular values
    m = random(*shape)
    assert (orthogonalize_svd(m) * m).sum().item() == pytest.approx(torch.linalg.svdvals(m).sum().item(), rel=1e-12)


@FORMS
@pytest.mark.parametrize("shape", [(3, 7, 4), (3, 4, 7), (3, 5, 5), (2, 3, 6, 4)], ids=str)
def test_a_stack_is_its_slices(orthogonalize, shape):
    stack = random(*shape) * torch.logspace(-2, 2, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    each = [orthogonalize(matrix) for matrix in stack.flatten(0, -3)]
    assert_close([orthogonalize(stack)], [torch.stack(each).view(shape)], 1e-12)


@FORMS
@SHAPES
def test_transposition_and_scale(orthogonalize, shape):
    m = random(*shape)
    expected = orthogonalize(m)
    assert_close([orthogonalize(m.T)], [expected.T], 1e-12)
    for factor in (1e-4, 3.0, 1e6):
        assert_close([orthogonalize(factor * m)], [expected], 1e-12)
    assert_close([orthogonalize(-m)], [-expected], 1e-12)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 3, 4)], ids=str)
def test_zeros_and_dtypes(orthogonalize, dtype, shape):
    zeros = orthogonalize(torch.zeros(shape, dtype=dtype))
    assert zeros.dtype == dtype and torch.equal(zeros, torch.zeros(shape, dtype=dtype))
    m = random(*shape, dtype=dtype)
    before = m.clone()
    result = orthogonalize(m)
    assert result.dtype == dtype and result.shape == m.shape
    assert torch.equal(m, before)
    # singular values in [0.6, 1.25]: the polynomial's [0.68, 1.14] with room for bfloat16's 0.4 % a rounding
    sigma = torch.linalg.svdvals(result.double())
    assert 0.6 < sigma.min() and sigma.max() < 1.25


def test_one_zero_matrix_in_a_stack():
    stack = random(3, 4, 6)
    stack[1] = 0
    result = newton_schulz(stack)
    assert torch.equal(result[1], torch.zeros(4, 6, dtype=torch.float64))
    assert_close([result[2]], [reference.newton_schulz(stack[2])], 1e-12)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (3, 4, 6), (6, 3, 2, 2)], ids=str)
def test_the_optimizer_uses_the_form_that_it_is_given(shape):
    """ns_steps=None is the exact form, a number is that many iterations; one step from m_1 = (1 - beta1) g_1."""
    for ns_steps, form in [(None, orthogonalize_svd), (3, lambda m: reference.newton_schulz(m, 3))]:
        (p,) = params = make_params([shape])
        x = p.detach().clone()
        g = make_gradients(params, 1)[0][0]
        matrices = g if g.ndim == 3 else g.flatten(1)[None]
        s = reference.scale(*matrices.shape[1:])
        expected = x - 0.1 * s * torch.stack([form(m) for m in matrices]).view(shape)
        p.grad = g
        MarsShampoo(params, lr=0.1, ns_steps=ns_steps).step()
        assert_close([p], [expected], 1e-12)


@pytest.mark.parametrize("decay", [0, 1, 2])
def test_two_steps_at_once_are_no_rougher_in_bfloat16(decay, monkeypatch):
    """Singular values 1/k^decay: the small ones are where rounding of the Gram matrix could grow."""
    sigma = [1 / k**decay for k in range(1, 65)]
    u, s, v = with_singular_values(sigma, 64, 256)
    matrix = (u @ s.diag() @ v.T).float()
    exact = reference.newton_schulz(matrix.double(), 5)
    monkeypatch.setattr(module, "CPU_HAS_BFLOAT16_UNITS", True)
    monkeypatch.setattr(module, "MIN_BFLOAT16", 1)
    errors = {}
    for wide in (2, 1000):
        monkeypatch.setattr(module, "WIDE", wide)
        errors[wide] = ((newton_schulz(matrix).double() - exact).norm() / exact.norm()).item()
    assert 0 < errors[2] < max(0.1, 1.2 * errors[1000]) < 0.5


@pytest.mark.parametrize(
    "device, capability, hip, dtype",
    [
        ("cuda", (9, 0), None, torch.bfloat16),
        ("cuda", (8, 0), None, torch.bfloat16),
        ("cuda", (7, 5), None, torch.float16),
        ("cuda", (6, 1), None, torch.float32),
        ("cuda", (9, 4), "6.4", torch.bfloat16),
        ("xpu", None, None, torch.bfloat16),
        ("mps", None, None, torch.float32),
    ],
    ids=str,
)
def test_what_the_matrix_units_take(device, capability, hip, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert module._accelerators_dtype.__wrapped__(torch.device(device)) == dtype


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("decay", [0, 1])
def test_float16_does_as_well_as_bfloat16(decay, scale, monkeypatch):
    """Whatever the scale: the division by the norm comes before the rounding."""
    u, s, v = with_singular_values([1 / k**decay for k in range(1, 65)], 64, 96)
    matrix = u @ s.diag() @ v.T
    exact = reference.newton_schulz(matrix, 5)
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        is_half = dtype == torch.float16
        monkeypatch.setattr(module, "_takes_float16", lambda x, is_half=is_half: is_half)
        monkeypatch.setattr(module, "CPU_HAS_BFLOAT16_UNITS", not is_half)
        monkeypatch.setattr(module, "MIN_BFLOAT16", 1)
        errors[dtype] = ((newton_schulz((scale * matrix).float()).double() - exact).norm() / exact.norm()).item()
    assert errors[torch.float16] < 0.5 * errors[torch.bfloat16] < 0.1


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_empty_matrices(shape):
    assert newton_schulz(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-12, 1e-20, 1e-30, 1e-36, 1e-40, 0.0])
def test_tiny_matrices_stay_finite(scale, dtype):
    """Squares of their entries vanish in float32, and with them the norm that they are divided by."""
    matrix = scale * torch.randn(30, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = newton_schulz(matrix.to(dtype))
    assert result.isfinite().all() and torch.linalg.matrix_norm(result.double(), 2) < 1.3
