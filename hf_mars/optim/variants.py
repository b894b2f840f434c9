"""The three optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .groups import ParameterRole
from .mars import Mars
from .settings import plain_adamw, plain_rate, settings_among
from .sharding import Ranks


class MarsAdamW(Mars):
    """MARS-AdamW (arXiv:2411.10438, Algorithm 2): AdamW on a variance-reduced gradient.

        κ   = γ·β1/(1−β1)
        c_t = g_t + κ (g_t − g_{t−1}),  c_1 = g_1
        c̃_t = c_t / max(1, ‖c_t‖₂ / max_norm)
        m_t = β1 m_{t−1} + (1−β1) c̃_t
        v_t = β2 v_{t−1} + (1−β2) c̃_t²
        x   ← x − η ( (m_t/(1−β1^t)) / (√(v_t/(1−β2^t)) + ε) + λ x )

    Parameters with fewer than two dimensions get plain AdamW with `betas_1d` and `lr_1d`, unless `optimize_1d`.

    The defaults are not the paper's, which are betas=(0.95, 0.99), gamma=0.025, max_norm=1.0, adjust_lr_fn="original"
    (docs/differences.md).

    Args:
        params: iterable of parameters, of (name, parameter) pairs, or of param_groups; every setting below may differ
            between groups.
        lr: learning rate η, at least 0; a 0-d tensor of it where CUDA graphs are captured.
        betas: (β1, β2), each in [0, 1).
        eps: ε, at least 0.
        weight_decay: λ, decoupled, at least 0.
        gamma: γ in [0, 1], the strength of the correction; 0 is AdamW, 1 with `exact` is STORM's momentum.
        max_norm: largest ‖c̃_t‖₂ of one parameter tensor, above 0; None: c̃_t = c_t.
        exact: subtract the gradient of the same mini-batch at x_{t−1} instead of g_{t−1}; see `previous_point`.
        lr_1d: learning rate of 1d parameters; None is lr with `adjust_lr_fn="match_rms_adamw"`, where lr is AdamW's,
            and else lr/2 (the ratio of the paper's GPT-2 runs).
        betas_1d: betas of 1d parameters.
        optimize_1d: give 1d parameters MARS, with `lr` and `betas`, too (MarsShampoo: MARS-AdamW at `lr_1d`).
        adjust_lr_fn: "match_rms_adamw" divides the adaptive part of the update (not the weight decay) by r(β1, γ),
            which gives it the root mean square of AdamW's where noise dominates the gradient, so that AdamW's learning
            rate carries over. r is 1 for γ = 0 and in exact mode. "original" is the paper's update.
        last_grad_dtype: dtype of g_{t−1}: `torch.float32`, `torch.bfloat16` or their names; None: the parameter's.
        state_dtype: dtype of "exp_avg" and "exp_avg_sq", likewise.
        kahan_sum: keep the rest that rounding drops from the updates of bfloat16 and float16 parameters, in one more
            tensor; None and True do, False does not.
        skip_nonfinite: measure the gradients, for one read of them, and let a step change nothing where one of them is
            not finite. Without it that happens where a norm is measured anyway: for `max_norm` (of the gradients that
            have one), or by the caller (`skip_unless_finite`; a Trainer does).
        foreach: which of torch's AdamW kernels to use, as for `torch.optim.AdamW`; either value turns off this
            package's own kernels.
        fused: by default the step is fused where the device has such kernels: torch's for plain AdamW, this package's
            own for the rest, on CPUs and GPUs; False turns these off.

    State of a parameter: "exp_avg" (m_t), "exp_avg_sq" (v_t), "last_grad" (g_{t−1}; where γ > 0 and not exact) or
    "last_param" (x_{t−1}; exact), all of the parameter's shape, and "step" (t, float32); with Kahan summation also
    "compensation".

    Raises:
        ValueError: a setting is out of its range.
    """

    matrix_update = "adamw"
    adjusts_lr = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.05,
        max_norm: float | None = None,
        exact: bool = False,
        lr_1d: float | None = None,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        optimize_1d: bool = False,
        adjust_lr_fn: str = "match_rms_adamw",
        last_grad_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | None = None,
        kahan_sum: bool | None = None,
        skip_nonfinite: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ):
        self._set_up(params, settings_among(locals()))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("adjust_lr_fn", "original")  # checkpoints of 0.1.0 have none


class MarsLion(Mars):
    """MARS-Lion (arXiv:2411.10438, Algorithm 3): the sign of a variance-reduced momentum.

        m_t = β1 m_{t−1} + (1−β1) c̃_t
        x   ← x − η ( sign(m_t) + λ x )

    with c̃_t as in `MarsAdamW`, whose settings it shares but for `adjust_lr_fn`: a sign has one size, whatever the
    noise. There is one average, not the two of Lion: the correction stands for the other (docs/algorithm.md, "What it
    equals"). `betas[1]` is not used; `eps` is for 1d parameters, which get AdamW. `lr_1d` is lr/2 by default.

    State of a parameter: one tensor, "exp_avg", the moving average of the plain gradients. With `max_norm`, or γ = 1,
    "exp_avg" is m_t and "last_grad" is g_{t−1}; in exact mode "last_param" is x_{t−1}.
    """

    matrix_update = "lion"


class MarsShampoo(Mars):
    """MARS-Shampoo (arXiv:2411.10438, Algorithm 4) and, with `adjust_lr_fn="match_rms_adamw"`, MARS-M
    (arXiv:2510.21800): the orthogonalised variance-reduced momentum.

        m_t = β1 m_{t−1} + (1−β1) c̃_t
        x   ← x − η ( s · NewtonSchulz(m_t) + λ x )

    with c̃_t as in `MarsAdamW`, whose settings it shares. Hidden matrices alone are orthogonalised. Embeddings and
    output heads get MARS-AdamW (MARS-M: AdamW with `betas_1d`), 1d parameters AdamW, all with `lr_1d`. Shapes cannot
    tell an embedding from a matrix: pass `hf_mars.param_groups(model)` or `roles`.

    Args:
        ns_steps: Newton–Schulz iterations, at least 1; None takes an exact singular value decomposition.
        adjust_lr_fn: the scale s: "original" is √max(1, fan_out/fan_in); "match_rms_adamw" is 0.2·√max(rows, columns),
            which gives the update AdamW's root mean square, so that one learning rate serves everything (lr_1d is lr).
        orthogonalize_embeddings: orthogonalise embeddings and heads too, as the authors' code does.
        roles: from `hf_mars.optim.parameter_roles(model)`: the role of each parameter, where shapes cannot tell. Used
            by the constructor alone: groups that are added later bring their own "kind" and "layout".
        process_group: ranks that hold the same parameters and gradients (data parallelism) and share out the matrices
            among themselves; None: each rank orthogonalises all. Sharded parameters know their ranks themselves.

    State of an orthogonalised parameter: as for `MarsLion`.
    """

    matrix_update = "shampoo"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.05,
        max_norm: float | None = None,
        exact: bool = False,
        lr_1d: float | None = None,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        optimize_1d: bool = False,
        ns_steps: int | None = 5,
        adjust_lr_fn: str = "original",
        orthogonalize_embeddings: bool = False,
        last_grad_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | None = None,
        kahan_sum: bool | None = None,
        skip_nonfinite: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        roles: Mapping[Tensor, ParameterRole] | None = None,
        process_group: Ranks | None = None,
    ):
        self._set_up(params, settings_among(locals()), roles)
        self.process_group = process_group

    def _settings_of_kind(self, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        if kind == "matrix" or (kind == "embedding" and settings["orthogonalize_embeddings"]):
            return {"update": "shampoo"}
        mars_m = settings["adjust_lr_fn"] == "match_rms_adamw"
        plain = not settings["optimize_1d"] if kind == "1d" else mars_m
        return {
            "update": "adamw",
            "lr": plain_rate(settings),
            **(plain_adamw(settings) if plain else {}),
        }
