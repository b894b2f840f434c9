"""MARS (arXiv:2411.10438), one tensor at a time, written from the equations with the paper's symbols.

Slow and plain on purpose: it is what the optimizers are compared with, so it shares no code with them.
One object is one parameter x with its own hyperparameters; `step(g)` is one step t.
"""

import math

import torch


def correction(g, g_prev, gamma, beta1):
    """c_t = g_t + kappa (g_t - g_{t-1}),  kappa = gamma beta1 / (1 - beta1);  c_1 = g_1."""
    if g_prev is None:
        return g
    kappa = gamma * beta1 / (1 - beta1)
    return g + kappa * (g - g_prev)


def clip(c, max_norm):
    """c~_t = c_t / max(1, ||c_t||_2 / max_norm), over the whole tensor."""
    if max_norm is None:
        return c
    return c / max(1.0, math.sqrt((c * c).sum().item()) / max_norm)


def newton_schulz(M, steps=5):
    """X_0 = M / ||M||_F;  X <- a X + (b A + c A A) X  with  A = X X^T,  taken on the side with fewer rows."""
    a, b, c = 3.4445, -4.7750, 2.0315
    if not M.any():
        return torch.zeros_like(M)
    if M.shape[0] > M.shape[1]:
        return newton_schulz(M.T, steps).T
    X = M / math.sqrt((M * M).sum().item())
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def scale(rows, columns, adjust_lr_fn="original", layout="out_in"):
    """s = sqrt(max(1, fan_out / fan_in)) in the paper, 0.2 sqrt(max(rows, columns)) in MARS-M (arXiv:2510.21800)."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    fan_out, fan_in = (columns, rows) if layout == "in_out" else (rows, columns)
    return math.sqrt(max(1.0, fan_out / fan_in))


class Mars:
    """x <- x - eta (direction(c~_t) + lam x), the part that the three optimizers share."""

    def __init__(self, x, *, eta, lam=0.0, betas=(0.95, 0.99), eps=1e-8, gamma=0.025, max_norm=1.0):
        self.x = x.detach().to(torch.float64, copy=True)
        self.eta, self.lam, self.eps, self.gamma, self.max_norm = eta, lam, eps, gamma, max_norm
        self.beta1, self.beta2 = betas
        self.t = 0
        self.g_prev = None
        self.m = torch.zeros_like(self.x)
        self.v = torch.zeros_like(self.x)
        self.clipped = []  # for each step taken, was the clip active

    def step(self, g, factor=1.0):
        """One step with the gradient g at the learning rate factor * eta; without a gradient, nothing at all."""
        if g is None:
            return
        g = g.detach().to(torch.float64, copy=True)
        self.t += 1
        c = correction(g, self.g_prev, self.gamma, self.beta1)
        c_tilde = clip(c, self.max_norm)
        self.clipped.append(not torch.equal(c, c_tilde))
        # m_t = beta1 m_{t-1} + (1 - beta1) c~_t
        self.m = self.beta1 * self.m + (1 - self.beta1) * c_tilde
        self.x = self.x - factor * self.eta * (self.direction(c_tilde) + self.lam * self.x)
        self.g_prev = g  # the gradient itself: neither corrected nor clipped


class AdamW(Mars):
    def direction(self, c_tilde):
        # v_t = beta2 v_{t-1} + (1 - beta2) c~_t^2
        self.v = self.beta2 * self.v + (1 - self.beta2) * c_tilde**2
        # (m_t / (1 - beta1^t)) / (sqrt(v_t / (1 - beta2^t)) + eps)
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        return m_hat / (v_hat.sqrt() + self.eps)


class Lion(Mars):
    def direction(self, c_tilde):
        # sign(m_t)
        return self.m.sign()


class Shampoo(Mars):
    def __init__(self, x, *, ns_steps=5, adjust_lr_fn="original", layout="out_in", **hyperparameters):
        super().__init__(x, **hyperparameters)
        self.ns_steps, self.adjust_lr_fn, self.layout = ns_steps, adjust_lr_fn, layout

    def direction(self, c_tilde):
        # s NewtonSchulz(m_t): a 3-D tensor is a stack of matrices, a convolution is (out, everything else)
        m = self.m
        if self.layout == "conv" or m.ndim > 3:
            return self.orthogonal(m.flatten(1)).reshape(m.shape)
        if m.ndim == 3:
            return torch.stack([self.orthogonal(matrix) for matrix in m])
        return self.orthogonal(m)

    def orthogonal(self, m):
        return scale(*m.shape, self.adjust_lr_fn, self.layout) * newton_schulz(m, self.ns_steps)


VARIANTS = {"adamw": AdamW, "lion": Lion, "shampoo": Shampoo}


def references(
    variant,
    params,
    *,
    lr,
    lr_1d=None,
    betas=(0.95, 0.99),
    betas_1d=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.0,
    gamma=0.025,
    max_norm=1.0,
    optimize_1d=False,
    adjust_lr_fn="original",
    ns_steps=5,
    orthogonalize_embeddings=False,
    kind=None,
    layout="out_in",
):
    """One object per parameter, each with the update and the hyperparameters that the method gives its kind.

    Parameters of fewer than two dimensions get plain AdamW with betas_1d at lr_1d, which is lr / 2 by default.
    Shampoo orthogonalises hidden matrices only: embeddings get MARS-AdamW at lr_1d. MARS-M has one learning rate,
    and plain AdamW for everything that is not orthogonalised.
    """
    mars_m = adjust_lr_fn == "match_rms_adamw"
    if lr_1d is None:
        lr_1d = lr if mars_m else lr / 2
    mars = {"eta": lr, "lam": weight_decay, "betas": betas, "eps": eps, "gamma": gamma, "max_norm": max_norm}
    plain = {**mars, "eta": lr_1d, "betas": betas_1d, "gamma": 0.0, "max_norm": None}
    built = []
    for x in params:
        is_1d = kind == "1d" or (kind is None and x.ndim < 2)
        if is_1d and not optimize_1d:
            built.append(AdamW(x, **plain))
        elif variant == "shampoo" and kind == "embedding" and not orthogonalize_embeddings:
            built.append(AdamW(x, **plain) if mars_m else AdamW(x, **{**mars, "eta": lr_1d}))
        elif variant == "shampoo":
            built.append(Shampoo(x, **mars, adjust_lr_fn=adjust_lr_fn, ns_steps=ns_steps, layout=layout))
        else:
            built.append(VARIANTS[variant](x, **mars))
    return built


class PlainLion:
    """Lion (arXiv:2302.06675):  x <- x - eta (sign(u_t) + lam x),  u_t = b1 m_{t-1} + (1 - b1) g_t,
    m_t = b2 m_{t-1} + (1 - b2) g_t.
    """

    def __init__(self, x, *, eta, lam=0.0, betas=(0.9, 0.99)):
        self.x = x.detach().to(torch.float64, copy=True)
        self.eta, self.lam = eta, lam
        self.b1, self.b2 = betas
        self.m = torch.zeros_like(self.x)

    def step(self, g):
        u = self.b1 * self.m + (1 - self.b1) * g
        self.x = self.x - self.eta * (u.sign() + self.lam * self.x)
        self.m = self.b2 * self.m + (1 - self.b2) * g
        return u


class PlainMuon:
    """Muon with Nesterov momentum:  B_t = mu B_{t-1} + g_t,  x <- x - eta (s NewtonSchulz(g_t + mu B_t) + lam x)."""

    def __init__(self, x, *, eta, lam=0.0, mu=0.95, adjust_lr_fn="original"):
        self.x = x.detach().to(torch.float64, copy=True)
        self.eta, self.lam, self.mu, self.adjust_lr_fn = eta, lam, mu, adjust_lr_fn
        self.B = torch.zeros_like(self.x)

    def step(self, g):
        self.B = self.mu * self.B + g
        s = scale(*g.shape, self.adjust_lr_fn)
        self.x = self.x - self.eta * (s * newton_schulz(g + self.mu * self.B) + self.lam * self.x)
