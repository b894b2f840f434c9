"""A problem whose gradients and Hessians are known, and exact steps on it."""

import torch
from helpers import make

MATRICES = [(7, 4), (4, 7), (5, 5)]


def make_exact(method, params, **settings):
    return make(method, params, **{"weight_decay": 0.1, "exact": True, **settings})


class Quadratic:
    """f(x; t), one a_t a step and one b_t a step and parameter; t may be a list of steps: the mean of their f."""

    def __init__(self, params, steps=30, seed=3):
        generator = torch.Generator().manual_seed(seed)
        self.params = params
        self.a = torch.rand(steps, generator=generator, dtype=torch.float64) + 0.5
        shapes = [p.shape for p in params]
        self.b = [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(steps)]

    def __call__(self, t):
        if isinstance(t, list):
            return sum(self(one) for one in t) / len(t)
        return sum(
            self.a[t] * p.square().sum() / 2 - (b.to(p.dtype) * p).sum()
            for p, b in zip(self.params, self.b[t], strict=True)
        )

    def train(self, optimizer, steps):
        """Exact steps for each of `steps`."""
        for t in steps:
            with optimizer.previous_point():
                self(t).backward()
            self(t).backward()
            optimizer.step()
            optimizer.zero_grad()
