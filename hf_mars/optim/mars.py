"""The MARS optimizers: parameter groups, state, and one step (arXiv:2411.10438)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from . import cpu, gpu
from .adamw import adamw
from .batch import Batch
from .correction import clipped, corrected_gradient, initial_average, reads_are_free, scaling
from .exact import at_previous_point
from .groups import KINDS, ParameterRole, check_not_flattened, dimensions, role_of_shape
from .hyperparameters import check_hyperparameters, dtype_name, dtype_of
from .last_grad import LastNorms, remember
from .lion import lion
from .precision import AVERAGES, needs_compensation, widened
from .shampoo import shampoo
from .sharding import is_sharded, local, local_grad, norms

UPDATES = {"adamw": adamw, "lion": lion, "shampoo": shampoo}

# Elements that are updated at a time where that takes temporary copies of them.
COPIED_AT_A_TIME = 1 << 24

# Settings that say how a group of the user's is split; what they decide stands in the resulting groups' own lr, betas…
_SPLIT_KEYS = ("lr_1d", "betas_1d", "optimize_1d", "orthogonalize_embeddings")


class Mars(Optimizer):
    """What MarsAdamW, MarsLion and MarsShampoo share. Not for direct use.

    Every param_group of the user's becomes up to one group per kind of parameter (and layout, for MarsShampoo), with
    the hyperparameters that kind is updated with, and three keys of ours: "kind", "layout" and "update" (the name of
    the update: "adamw", "lion" or "shampoo"). A group may bring its own "kind" and "layout"; else a parameter's shape
    decides (see :mod:`hf_mars.optim.groups`).
    """

    matrix_update: str

    def __init__(
        self,
        params: Iterable,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.025,
        max_norm: float | None = 1.0,
        exact: bool = False,
        lr_1d: float | None = None,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        optimize_1d: bool = False,
        last_grad_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | None = None,
        kahan_sum: bool | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
    ):
        self._set_up(params, _settings_among(locals()))

    def _set_up(self, params: Iterable, settings: dict[str, Any], roles: Mapping[Tensor, ParameterRole] | None = None):
        self._roles = roles or {}
        super().__init__(params, settings)
        del self._roles  # it would keep alive the parameters that an engine replaces
        self._start_anew()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start_anew()

    def _start_anew(self) -> None:
        """What is known of the last step, beside the state."""
        self._last_norms = LastNorms()
        self._forget_previous_point()

    # ---- groups ----

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, split into groups of one kind each.

        Args:
            param_group: as for ``torch.optim.Optimizer``; every hyperparameter of the constructor may be set in it,
                and "kind" (one of "matrix", "embedding", "1d") and "layout" ("out_in", "in_out", "conv") for all its
                parameters.

        Raises:
            ValueError: a hyperparameter is out of range, or a parameter cannot be optimized.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        params = param_group["params"]
        if isinstance(params, set):
            raise TypeError("params must be an ordered collection such as a list, got a set")
        settings = {**self.defaults, **{key: value for key, value in param_group.items() if key != "params"}}
        check_hyperparameters(settings)
        settings.update({key: dtype_name(settings[key]) for key in ("last_grad_dtype", "state_dtype")})
        by_role: dict[ParameterRole, list] = {}
        seen: set[Tensor] = set()
        for param in [params] if isinstance(params, Tensor) else list(params):
            tensor = param[1] if isinstance(param, tuple) else param
            if not isinstance(tensor, Tensor):
                raise TypeError(f"params must be Tensors, got {type(tensor).__name__}")
            if tensor.is_complex():
                raise ValueError(f"params must be real, got a parameter of dtype {tensor.dtype}")
            check_not_flattened(tensor)
            if tensor in seen:
                raise ValueError(f"params must be distinct, got a parameter of shape {tuple(tensor.shape)} twice")
            seen.add(tensor)
            by_role.setdefault(self._role(tensor, settings), []).append(param)
        if not by_role:  # the user's groups stay, empty ones too (LoRA has no undecayed parameters)
            by_role[ParameterRole(settings.get("kind", "matrix"), settings.get("layout", "out_in"))] = []
        # Matrices first: what logs "the" learning rate takes the first group's.
        for role in sorted(by_role, key=lambda role: KINDS.index(role.kind)):
            group = {**settings, **self._settings_of_kind(role.kind, settings)}
            group.update(params=by_role[role], kind=role.kind, layout=role.layout)
            if group["fused"] is None:
                group["fused"] = _takes_fused_kernel(group)
            super().add_param_group(group)
            for key in _SPLIT_KEYS:  # which super() has just copied from the defaults
                self.param_groups[-1].pop(key, None)

    def _role(self, param: Tensor, settings: dict[str, Any]) -> ParameterRole:
        guess = self._roles.get(param) if "_roles" in self.__dict__ else None
        guess = guess or role_of_shape(param)
        role = ParameterRole(settings.get("kind", guess.kind), settings.get("layout", guess.layout))
        if role.kind == "matrix" and self.matrix_update == "shampoo" and dimensions(param) < 2:
            raise ValueError(
                f"kind='matrix' needs two or more dimensions to orthogonalise, got shape {tuple(param.shape)}"
            )
        return role

    def _settings_of_kind(self, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        """The hyperparameters in which a group of ``kind`` differs from what the user set."""
        lr_1d = settings["lr"] / 2 if settings["lr_1d"] is None else settings["lr_1d"]
        if kind == "1d" and not settings["optimize_1d"]:
            return {"update": "adamw", "lr": lr_1d, **_plain_adamw(settings)}
        return {"update": self.matrix_update}

    # ---- one step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):
        """Update every parameter that has a gradient. Gradients are read, never changed.

        Args:
            closure: evaluates the loss again and returns it; called first, with gradients enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse; or an engine has flattened matrices that the update needs whole; or, in
                exact mode, the gradient at x_{t−1} was not evaluated.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_previous_point()
        rounds = self._rounds()
        for group in self.param_groups:
            if group["exact"]:
                self._remember_point(group)
        for batches in rounds:
            composed = [batch for batch in batches if batch.kernels is None]
            for batch in composed:
                batch.c = corrected_gradient(batch.grads, batch.previous_grads, kappa=_kappa(batch.group))
            _measure(composed)
            for batch in batches:
                self._update(batch)
                if batch.keeps_last_grad and batch.kernels is None:
                    _remember(batch)
        self._forget_previous_point()
        return loss

    def _rounds(self) -> list[list[Batch]]:
        """What is updated together: everything, so that the clip's norms take one exchange between ranks a step;
        batches that take temporary copies one piece after the other."""
        together, apart = [], []
        for group in self.param_groups:
            for params in _alike([param for param in group["params"] if param.grad is not None]):
                batch = self._collect(group, params)
                (apart if batch.takes_copies else together).append(batch)
        return [together, *([piece] for batch in apart for piece in batch.pieces(COPIED_AT_A_TIME))]

    def _collect(self, group: dict[str, Any], params: list[Tensor]) -> Batch:
        one_tensor = self._one_tensor_form(group)
        for param in params:
            if param.grad.is_sparse:
                raise RuntimeError("MARS does not support sparse gradients; build the embedding with sparse=False")
        grads = [local_grad(param) for param in params]
        complete = _state_keys(params[0].dtype, group, one_tensor)
        for param, grad in zip(params, grads, strict=True):
            if self.state[param].keys() != complete:
                self._init_state(param, grad, group, one_tensor)
        states = [self.state[param] for param in params]
        if one_tensor or _kappa(group) == 0:
            previous_grads = None
        elif group["exact"]:
            previous_grads = self._take_previous_grads(params, grads)
        else:
            previous_grads = [local(state["last_grad"]) for state in states]
        batch = Batch(group, params, grads, states, previous_grads)
        batch.kernels = next((kernels for kernels in (gpu, cpu) if kernels.can_step(batch)), None)
        return batch

    def _update(self, batch: Batch) -> None:
        if batch.kernels is not None:
            batch.kernels.step(batch, self._last_norms)
            return
        group, c, gamma = batch.group, batch.c, batch.gamma
        if gpu.is_captured(batch.grads[0]):
            self._last_norms.distrust()
        if group["max_norm"] is not None:
            c = clipped(c, batch.norms, group["max_norm"], in_place=batch.previous_grads is not None)
        if batch.takes_wide_copies:
            with widened(batch.params, c, batch.states, group) as (params, c, states):
                self._apply(params, c, states, group, gamma=gamma)
        else:
            self._apply(batch.params, c, batch.states, group, gamma=gamma)

    def _apply(self, params, c, states, group, *, gamma: float) -> None:
        UPDATES[group["update"]](params, c, states, group, gamma=gamma)

    def _one_tensor_form(self, group: dict[str, Any]) -> bool:
        """Whether m_t comes from one moving average and g_t, without g_{t−1}; see correction.momentum.

        A group that began with g_{t−1} (max_norm was set to None later) goes on with it.
        """
        return (
            group["update"] != "adamw"
            and group["max_norm"] is None
            and not group["exact"]
            and group["gamma"] < 1
            and not any("last_grad" in self.state.get(param, ()) for param in group["params"])
        )

    def _init_state(self, param: Tensor, grad: Tensor, group: dict[str, Any], one_tensor: bool) -> None:
        """Make the state of a parameter when it first needs it: at its first gradient, the same on every rank."""
        state = self.state[param]

        def zeros(key: str) -> Tensor:
            return torch.zeros_like(param, dtype=_state_dtype(key, param, group), memory_format=torch.preserve_format)

        if "exp_avg" not in state:
            check_not_flattened(param)  # by an engine that wraps the model after the optimizer is made
            _check_whole(param, group)
            if group["update"] == "adamw":
                # Where torch's AdamW keeps it: a fused kernel reads it on the device, the others on the host.
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if group["fused"] else "cpu")
                state["exp_avg_sq"] = zeros("exp_avg_sq")
            state["exp_avg"] = zeros("exp_avg")
            if one_tensor:
                local(state["exp_avg"]).copy_(initial_average(grad, group["gamma"]))
        # What this form does not keep up to date must not be there when the group's settings change back.
        if not group["exact"]:
            state.pop("last_param", None)
        if group["exact"] or _kappa(group) == 0:
            state.pop("last_grad", None)
        elif not one_tensor and "last_grad" not in state:
            # The paper's x_1 = x_0: no difference yet, so c_1 = g_1.
            state["last_grad"] = zeros("last_grad")
            remember([local(state["last_grad"])], [grad], None)
        if not needs_compensation(param.dtype, group):
            state.pop("compensation", None)
        elif "compensation" not in state:
            state["compensation"] = zeros("compensation")

    # ---- exact mode ----

    @property
    def needs_previous_point(self) -> bool:
        """Whether the next step() needs ∇f(x_{t−1}, ξ_t): exact mode, γ > 0, and not at t = 1, where x_0 = x_1."""
        groups = [group for group in self.param_groups if group["exact"]]
        return any(_kappa(group) > 0 for group in groups) and any(
            "last_param" in self.state.get(param, {}) for group in groups for param in group["params"]
        )

    @contextlib.contextmanager
    def previous_point(self):
        """Exact mode: gradients made inside are ∇f(x_{t−1}, ξ_t), which the next step() corrects with.

        Inside, the parameters hold x_{t−1}. On leaving, also after an exception, they are x_t again bit for bit, their
        ``.grad`` is what it was on entering, and the random number generators (Python's, NumPy's, torch's of the CPU
        and of the parameters' devices) stand where they stood, so that the evaluation at x_t draws the same dropout
        masks. An exception drops the gradients made inside. May be entered several times before one step(), as
        gradient accumulation does: the gradients add up. step() uses them up, zero_grad() drops them. At t = 1 the
        gradients made inside are dropped (x_0 = x_1, c_1 = g_1); :attr:`needs_previous_point` tells.

        Groups with exact=False stay at x_t.

        Source: arXiv:2411.10438, Algorithm 1.

        Raises:
            RuntimeError: no param_group has exact=True, or the context is already entered.
        """
        exact_groups = [group for group in self.param_groups if group["exact"]]
        if not exact_groups:
            raise RuntimeError("previous_point() needs an optimizer made with exact=True")
        if self._at_previous_point:
            raise RuntimeError("previous_point() is already entered; leave it before entering it again")
        moved = [
            param for group in exact_groups for param in group["params"] if "last_param" in self.state.get(param, {})
        ]
        pairs = [(param, self.state[param]["last_param"]) for param in moved]
        params = [param for group in self.param_groups for param in group["params"]]
        self._at_previous_point = True
        try:
            with at_previous_point(pairs, params, self._previous_grads):
                yield
            self._previous_point_seen = bool(pairs)
        finally:
            self._at_previous_point = False

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, those of the previous point too: the two belong to one step().

        A loop that skips a bad batch would otherwise correct the next one with the gradients of both.
        """
        super().zero_grad(set_to_none)
        if not self._at_previous_point:
            self._forget_previous_point()

    def _check_previous_point(self) -> None:
        """Raise where step() could not do the right thing, before it changes anything."""
        if self._at_previous_point:
            raise RuntimeError(
                "step() inside previous_point(): the parameters are at x_{t−1}; leave the context first"
            )
        if self._previous_point_seen or not self.needs_previous_point:
            return
        corrected = [group for group in self.param_groups if group["exact"] and _kappa(group) > 0]
        if any(param.grad is not None for group in corrected for param in group["params"]):
            raise RuntimeError(
                "exact=True needs the gradient at the previous point before step(): evaluate the same batch in "
                "`with optimizer.previous_point():` first (MarsTrainer does it by itself; zero_grad() drops what was "
                "evaluated, so call it after step()), or use exact=False"
            )

    def _take_previous_grads(self, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        if not self._previous_point_seen:
            return [grad.clone() for grad in grads]  # x_0 = x_1
        # No gradient there: the parameter took no part in this batch at x_{t−1} (an expert not routed to).
        return [
            local_grad(param, self._previous_grads[param]) if param in self._previous_grads else torch.zeros_like(grad)
            for param, grad in zip(params, grads, strict=True)
        ]

    def _remember_point(self, group: dict[str, Any]) -> None:
        """Keep x_t, which this step moves away from. Parameters that it leaves alone have x_{t+1} = x_t."""
        for param in group["params"]:
            last_param = self.state.get(param, {}).get("last_param")
            if last_param is not None:
                last_param.copy_(param)
            elif param.grad is not None:
                self.state[param]["last_param"] = param.detach().clone(memory_format=torch.preserve_format)

    def _forget_previous_point(self) -> None:
        self._previous_grads: dict[Tensor, Tensor] = {}
        self._previous_point_seen = False
        self._at_previous_point = False

    # ---- state dict ----

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() of the same optimizer class over the same groups returned.

        Raises:
            ValueError: it belongs to another MARS variant, or its groups do not match.
        """
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):
            for i, (saved, own) in enumerate(zip(groups, self.param_groups, strict=True)):
                if saved.get("update") != own["update"]:
                    raise ValueError(
                        f"state_dict: param_group {i} was saved with update={saved.get('update')!r}, but "
                        f"{type(self).__name__} has {own['update']!r} there; load it into the optimizer it came from"
                    )
        super().load_state_dict(state_dict)
        self._load_dtypes(state_dict)

    def _load_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Undo torch's rounding of every state to the parameter's dtype, where the group's settings say otherwise."""
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [(param, group) for group in self.param_groups for param in group["params"]]
        for i, (param, group) in zip(saved_ids, own, strict=True):
            for key in (*AVERAGES, "last_grad"):
                saved = state_dict["state"].get(i, {}).get(key)
                dtype = _state_dtype(key, param, group)
                if saved is not None and self.state[param][key].dtype != dtype:
                    self.state[param][key] = saved.to(param.device, dtype, copy=True)


class MarsAdamW(Mars):
    r"""MARS-AdamW (arXiv:2411.10438, Algorithm 2): AdamW on a variance-reduced gradient.

    .. math::
        c_t &= g_t + \gamma \tfrac{\beta_1}{1-\beta_1} (g_t - g_{t-1}), \qquad c_1 = g_1 \\
        \tilde c_t &= c_t / \max(1, \lVert c_t \rVert_2 / \text{max\_norm}) \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\, \tilde c_t \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2)\, \tilde c_t^2 \\
        x_{t+1} &= x_t - \eta \Big(
            \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon} + \lambda x_t \Big)

    Parameters with fewer than two dimensions get plain AdamW with ``betas_1d`` and ``lr_1d``, unless ``optimize_1d``.

    Args:
        params: iterable of parameters, of (name, parameter) pairs, or of param_groups; every setting below may differ
            between groups.
        lr: learning rate η, at least 0.
        betas: (β1, β2), each in [0, 1).
        eps: ε, at least 0.
        weight_decay: λ, decoupled, at least 0.
        gamma: γ in [0, 1], the strength of the correction; 0 is AdamW, 1 with ``exact`` is STORM's momentum.
        max_norm: largest ‖c̃_t‖₂ of one parameter tensor, above 0; None turns the clip off.
        exact: subtract the gradient of the same mini-batch at x_{t−1} instead of g_{t−1}; see :meth:`previous_point`.
        lr_1d: learning rate of 1d parameters; None is lr/2 (the ratio of the paper's GPT-2 runs).
        betas_1d: betas of 1d parameters.
        optimize_1d: give 1d parameters MARS, with ``lr`` and ``betas``, too.
        last_grad_dtype: dtype of g_{t−1}: ``torch.float32``, ``torch.bfloat16`` or their names; None: the parameter's.
        state_dtype: dtype of "exp_avg" and "exp_avg_sq", likewise.
        kahan_sum: keep what rounding drops from the updates of bfloat16 and float16 parameters, in one more tensor;
            None and True do, False does not.
        foreach, fused: which of torch's AdamW kernels to use. By default the step is fused where the device has such
            kernels: torch's for plain AdamW, this package's own for the rest, on CPUs and GPUs; ``foreach`` (either
            value) and ``fused=False`` turn these off.

    State of a parameter: "exp_avg" (m_t), "exp_avg_sq" (v_t), "last_grad" (g_{t−1}; where γ > 0 and not exact) or
    "last_param" (x_{t−1}; exact), all of the parameter's shape, and "step" (t, float32); with Kahan summation also
    "compensation".

    Raises:
        ValueError: a setting is out of its range.
    """

    matrix_update = "adamw"


class MarsLion(Mars):
    r"""MARS-Lion (arXiv:2411.10438, Algorithm 3): the sign of a variance-reduced momentum.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1)\, \tilde c_t, \qquad
        x_{t+1} = x_t - \eta (\mathrm{sign}(m_t) + \lambda x_t)

    with :math:`\tilde c_t` as in :class:`MarsAdamW`, whose settings it shares; β2 and ε are used by 1d parameters
    alone, which get AdamW.

    State of a parameter: "exp_avg" (m_t) and "last_grad" (g_{t−1}). With max_norm=None in the approximate form one
    tensor is enough: then there is no "last_grad", and "exp_avg" is the moving average of the plain gradients.
    """

    matrix_update = "lion"


class MarsShampoo(Mars):
    r"""MARS-Shampoo (arXiv:2411.10438, Algorithm 4) and, with ``adjust_lr_fn="match_rms_adamw"``, MARS-M
    (arXiv:2510.21800): the orthogonalised variance-reduced momentum.

    .. math::
        m_t = \beta_1 m_{t-1} + (1-\beta_1)\, \tilde c_t, \qquad
        x_{t+1} = x_t - \eta (s \cdot \mathrm{NewtonSchulz}(m_t) + \lambda x_t)

    with :math:`\tilde c_t` as in :class:`MarsAdamW`, whose settings it shares. Hidden matrices alone are
    orthogonalised. Embeddings and output heads get MARS-AdamW (MARS-M: AdamW with ``betas_1d``), 1d parameters AdamW,
    all with ``lr_1d``. Shapes cannot tell an embedding from a matrix: pass ``hf_mars.param_groups(model)`` or
    ``roles``.

    Args:
        ns_steps: Newton–Schulz iterations, at least 1; None takes an exact singular value decomposition.
        adjust_lr_fn: the scale s: "original" is √max(1, fan_out/fan_in); "match_rms_adamw" is 0.2·√max(rows, columns),
            which gives the update AdamW's root mean square, so that one learning rate serves everything (lr_1d is lr).
        orthogonalize_embeddings: orthogonalise embeddings and heads too, as the authors' code does.
        roles: from ``hf_mars.optim.parameter_roles(model)``: what each parameter is, where shapes cannot tell.
        process_group: ranks that hold the same parameters and gradients (data parallelism) and share out the matrices
            among themselves; None: each rank orthogonalises all. Sharded parameters know their ranks themselves.

    State of an orthogonalised parameter: as for :class:`MarsLion`.
    """

    matrix_update = "shampoo"
    process_group: ProcessGroup | None = None

    def __init__(
        self,
        params: Iterable,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.025,
        max_norm: float | None = 1.0,
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
        foreach: bool | None = None,
        fused: bool | None = None,
        roles: Mapping[Tensor, ParameterRole] | None = None,
        process_group: ProcessGroup | None = None,
    ):
        self._set_up(params, _settings_among(locals()), roles)
        self.process_group = process_group

    def _apply(self, params, c, states, group, *, gamma: float) -> None:
        if group["update"] == "shampoo":
            shampoo(params, c, states, group, gamma=gamma, replicas=self.process_group)
        else:
            super()._apply(params, c, states, group, gamma=gamma)

    def _settings_of_kind(self, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        if kind == "matrix" or (kind == "embedding" and settings["orthogonalize_embeddings"]):
            return {"update": "shampoo"}
        mars_m = settings["adjust_lr_fn"] == "match_rms_adamw"
        lr_1d = settings["lr_1d"]
        if lr_1d is None:
            lr_1d = settings["lr"] if mars_m else settings["lr"] / 2
        plain = not settings["optimize_1d"] if kind == "1d" else mars_m
        return {"update": "adamw", "lr": lr_1d, **(_plain_adamw(settings) if plain else {})}


def _settings_among(arguments: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments that are settings of param_groups."""
    others = ("self", "params", "roles", "process_group", "__class__")
    return {k: v for k, v in arguments.items() if k not in others}


def _plain_adamw(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with which a group gets AdamW, uncorrected and unclipped."""
    return {"betas": settings["betas_1d"], "gamma": 0.0, "max_norm": None}


def _check_whole(param: Tensor, group: dict[str, Any]) -> None:
    """Refuse a matrix that an engine has made a flat slice of, where the update depends on it as a whole."""
    if group["kind"] == "1d" or param.ndim > 1 or (group["update"] != "shampoo" and group["max_norm"] is None):
        return
    instead = "" if group["update"] == "shampoo" else "set max_norm=None (no clip) or "
    raise RuntimeError(
        f"update={group['update']!r} with max_norm={group['max_norm']} needs whole matrices, but got a flat slice of "
        f"shape {tuple(param.shape)}, as DeepSpeed makes them; {instead}use FSDP2"
    )


def _kappa(group: dict[str, Any]) -> float:
    return scaling(group["gamma"], group["betas"][0])


def _state_dtype(key: str, param: Tensor, group: dict[str, Any]) -> torch.dtype:
    """The dtype that ``group`` wants a state of ``param`` in."""
    setting = {"last_grad": "last_grad_dtype", "exp_avg": "state_dtype", "exp_avg_sq": "state_dtype"}.get(key)
    return (setting and dtype_of(group[setting])) or param.dtype


def _state_keys(dtype: torch.dtype, group: dict[str, Any], one_tensor: bool) -> set[str]:
    """What :meth:`Mars._init_state` leaves in the state of a parameter of ``dtype``."""
    keys = {"exp_avg"}
    if group["update"] == "adamw":
        keys |= {"step", "exp_avg_sq"}
    if not (group["exact"] or one_tensor or _kappa(group) == 0):
        keys.add("last_grad")
    if needs_compensation(dtype, group):
        keys.add("compensation")
    return keys


def _alike(params: list[Tensor]) -> list[list[Tensor]]:
    """Lists of parameters of one dtype on one device: mostly one."""
    lists: dict[tuple, list[Tensor]] = {}
    for param in params:
        lists.setdefault((param.dtype, param.device), []).append(param)
    return list(lists.values())


def _measure(batches: list[Batch]) -> None:
    """‖c_t‖₂ of all parameters that want it, with one exchange between ranks."""
    measured = [batch for batch in batches if batch.wants_norms]
    values = iter(norms([x for b in measured for x in b.c], [param for b in measured for param in b.params]))
    for batch in measured:
        batch.norms = [next(values) for _ in batch.params]
        if reads_are_free(batch.c):
            batch.norms = [norm.item() for norm in batch.norms]
            if not any(map(is_sharded, batch.params)):  # this rank's part may be finite where the whole is not
                batch.finite = [math.isfinite(norm) for norm in batch.norms]


def _remember(batch: Batch) -> None:
    kept = remember(batch.previous_grads, batch.grads, batch.finite)
    if not any(map(is_sharded, batch.params)):  # whose g_{t−1} stays the DTensor that it is
        for state, last_grad in zip(batch.states, kept, strict=True):
            state["last_grad"] = last_grad


def _takes_fused_kernel(group: dict[str, Any]) -> bool:
    """Whether torch's fused AdamW, the fastest, can run on these parameters. What is on "meta" moves later."""
    devices = {*_get_fused_kernels_supported_devices(), "meta"}
    tensors = [param[1] if isinstance(param, tuple) else param for param in group["params"]]
    return group["foreach"] is None and all(t.device.type in devices and t.is_floating_point() for t in tensors)
