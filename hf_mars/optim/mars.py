"""What the MARS optimizers share: parameter groups, and one step (arXiv:2411.10438, Algorithm 1)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .batch import Seen, collect
from .clip import Clip
from .exact import PreviousPoint
from .execution import by_execution, fused_in_effect
from .form import Form
from .global_clip import GlobalClip
from .groups import KINDS, ParameterRole, check_not_flattened, dimensions, role_of_shape
from .host import check_captured
from .hyperparameters import check_hyperparameters, dtype_name
from .last_grad import LastNorms
from .settings import SPLIT_KEYS, plain_adamw, plain_rate, settings_among, takes_fused_kernel
from .sharding import Originals, Ranks, whole_value
from .skipping import Norm, Skip, SkippedSteps, norms_to_skip_by
from .state import FORMAT, FORMAT_KEY, Made, begin_with_zero, check_state_dict, load_dtypes, unmake_states

_GUESSED = (
    "MarsShampoo takes every parameter with two or more dimensions for a hidden matrix stored (out, in), since shapes "
    "do not tell; embeddings and output heads would be orthogonalised too, and GPT-2's Conv1D be misread: pass "
    'hf_mars.param_groups(model), or {"params": matrices, "kind": "matrix"} where that is right'
)


class Mars(Optimizer):
    """The base of MarsAdamW, MarsLion and MarsShampoo. Not for direct use.

    Every param_group of the user's becomes up to one group per kind of parameter (and layout, for MarsShampoo), with
    the hyperparameters that kind is updated with, and three keys of ours: "kind", "layout" and "update" (the name of
    the update: "adamw", "lion" or "shampoo"). A group may bring its own "kind" and "layout"; else a parameter's shape
    decides (see `hf_mars.optim.groups`).
    """

    matrix_update: str
    adjusts_lr = False  # whether `adjust_lr_fn` is about the AdamW updates
    process_group: Ranks | None = None

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
        last_grad_dtype: torch.dtype | str | None = None,
        state_dtype: torch.dtype | str | None = None,
        kahan_sum: bool | None = None,
        skip_nonfinite: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ):
        self._set_up(params, settings_among(locals()))

    def _set_up(
        self, params: Iterable[Any], settings: dict[str, Any], roles: Mapping[Tensor, ParameterRole] | None = None
    ) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"params must be parameters, got a module ({type(params).__name__}); pass "
                "hf_mars.param_groups(model) or model.parameters()"
            )
        self._roles: Mapping[Tensor, ParameterRole] = roles or {}
        self._originals = Originals()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._guesses = False
        super().__init__(params, settings)
        if self._guesses:
            warnings.warn(_GUESSED, stacklevel=3)  # at the line that makes the optimizer, once for each
        del self._roles  # it would keep alive the parameters that an engine replaces
        self.global_clip = GlobalClip()
        self._start_anew()

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups")
        super().__setstate__(state)
        if before is None:  # unpickled
            self.global_clip = GlobalClip()
            self._originals = Originals()
            for group in self.param_groups:
                self._originals.add(group)
        else:
            self._originals.follow(before, self.param_groups)
        for group in self.param_groups:
            group.setdefault("skip_nonfinite", False)  # checkpoints of 0.1.0 have none
        self._sizes = {}
        for group in self.param_groups:
            self._count(group)
        self._start_anew()

    def _start_anew(self) -> None:
        """Everything that is known beside the state."""
        self._forms: dict[Tensor, Form] = {}
        self._seen: dict[int, Seen] = {}
        self._last_norms = LastNorms()
        self._previous_point = PreviousPoint()
        self._told_norms: tuple[Norm, ...] = ()
        self._skipped_steps = SkippedSteps()
        self._executions: dict[str, dict[str, None]] = {}

    # ---- one step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. Gradients are read, never changed.

        Args:
            closure: evaluates the loss again and returns it; called first, with gradients enabled.

        Returns:
            The loss that `closure` returned, or None.

        Raises:
            RuntimeError: a gradient is sparse; or an engine has flattened matrices that the update needs whole; or, in
                exact mode, the gradient at x_{t−1} was not evaluated; or a CUDA graph is captured, and `lr` is not a
                tensor on the device, or the host counts the steps (`fused=False`).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_captured(self.param_groups)
        self._previous_point.check(self.param_groups, self.state)
        clip = self.global_clip.of_gradients(self.param_groups)
        skip = self._skip(clip)
        if not skip.on_host():
            self._step(skip, clip)
        if clip is not None:
            self.global_clip.use()
        if not torch.compiler.is_compiling():
            self._skipped_steps.count(skip, self.param_groups)
        self._previous_point.forget()
        return loss

    def _skip(self, clip: Clip | None) -> Skip:
        told, self._told_norms = self._told_norms, ()
        norms = [*told] if clip is None else [*told, clip.total_norm]
        if told or (clip is not None and clip.is_measured and not self.previous_grads):
            return Skip(norms, is_complete=True)
        return Skip([*norms, *norms_to_skip_by(self.param_groups, self.previous_grads, self._originals)])

    def _step(self, skip: Skip, clip: Clip | None) -> None:
        made: list[Made] = []
        batches = collect(
            self.param_groups,
            self.state,
            self._forms,
            self._seen,
            self._previous_point.gradients,
            self._originals,
            made,
            clip,
            adjusts_lr=self.adjusts_lr,
            replicas=self.process_group,
        )
        by_executions = by_execution(batches, self._executions)
        measured = [execution.measure(some, self._last_norms, skip) for execution, some in by_executions]
        if skip.on_host():
            unmake_states(made, self.state, self._forms)
            return
        begin_with_zero(made, self.state, skip)
        self._previous_point.keep(self.param_groups, self.state, skip)
        for (execution, some), norms in zip(by_executions, measured, strict=True):
            execution.step(some, norms, self._last_norms, skip)

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, *, error_if_nonfinite: bool = False, total_norm: Norm | None = None
    ) -> Tensor:
        """Let step() take f·g for the present gradients g, with f = min(1, max_norm / (‖g‖₂ + 1e-6)).

        As torch.nn.utils.clip_grad_norm_, in fewer passes over memory: gradients are read here and never written to.
        Call it after the last backward pass, and after a gradient scaler's `unscale_`. The factor belongs to these
        gradients: every step() on them takes it, and zero_grad() drops it. A step() on others that have come in
        between raises, unless a step has been taken and all are others: a later update, which is not clipped. A second
        call takes the place of the first. A step whose total norm is not finite changes nothing, as with
        `skip_unless_finite`. Inside of `previous_point()` the gradients are multiplied at once.

        Args:
            max_norm: largest ‖g_t‖₂ over all parameters, a number or a tensor of one; `math.inf` measures alone.
            error_if_nonfinite: raise if the total norm is not finite, which the host then waits for.
            total_norm: ‖g‖₂, where more gradients than this optimizer's are clipped together: the root of the sum of
                the squares of what `clip_grad_norm_(math.inf)` returns for each optimizer.

        Returns:
            ‖g‖₂ before the clip, a 0-d tensor: float64 if a gradient is, else float32. Sums of blocks of squares are
            added in float64, so that it differs from torch's, which loses up to some thousandths where tensors have
            millions of elements.

        Raises:
            TypeError: max_norm or total_norm is not a number.
            ValueError: max_norm is negative or NaN, or total_norm is not one number, or is negative.
            RuntimeError: a gradient is sparse; the norm is not finite and `error_if_nonfinite`; or called in a
                function that torch.compile compiles.
        """
        return self.global_clip.clip(
            self.param_groups,
            self._originals,
            max_norm,
            total_norm,
            error_if_nonfinite=error_if_nonfinite,
            at_once=self._previous_point.is_entered,
        )

    # ---- steps that change nothing ----

    def skip_unless_finite(self, *norms: Norm) -> None:
        """Let the next step() change nothing (no parameter, no state) if one of these norms is not finite.

        For those who have measured them anyway: `optimizer.skip_unless_finite(clip_grad_norm_(…))`. The host does not
        read a norm on an accelerator. There two things differ from a step that was not there: after a skipped first
        step the next correction is that of g_0 = 0; and with foreach=True, or fused=False, t counts the step.

        Args:
            norms: of all gradients, numbers or 0-d tensors, equal in all processes; in exact mode also of those at
                x_{t−1}. They replace those of an earlier call.
        """
        self._told_norms = tuple(whole_value(norm) for norm in norms)

    @property
    def skipped_steps(self) -> int:
        """The number of steps that changed nothing, since the optimizer was made or loaded."""
        return self._skipped_steps.read()[0]

    @property
    def skipped_in_a_row(self) -> int:
        """The number of them since the last step that changed something."""
        return self._skipped_steps.read()[1]

    @property
    def sizes(self) -> Mapping[str, tuple[int, int]]:
        """By kind of parameter: how many tensors this optimizer was given, and their elements.

        Those of whole parameters, also where an engine has put slices in their place since.
        """
        return self._sizes

    @property
    def executions(self) -> Mapping[str, str]:
        """What has taken the steps of each kind of parameter so far, in words, by kind.

        "the compiled step", "Triton's kernels" or "torch's kernels", the latter with the reason; empty before the
        first step, and where the compiler (`torch.compile`) fuses the steps.
        """
        return {kind: " and ".join(words) for kind, words in self._executions.items()}

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, those of the previous point too: the two belong to one step().

        A loop that skips a bad batch would otherwise correct the next one with the gradients of both.
        """
        super().zero_grad(set_to_none)
        if not self._previous_point.is_entered:  # inside, the gradients at x_t are put aside
            self.global_clip.forget()
            self._previous_point.forget()

    # ---- exact mode ----

    @property
    def needs_previous_point(self) -> bool:
        """Whether the next step() needs ∇f(x_{t−1}, ξ_t): exact mode, γ > 0, and not at t = 1, where x_0 = x_1."""
        return self._previous_point.is_needed(self.param_groups, self.state)

    @property
    def previous_grads(self) -> Mapping[Tensor, Tensor]:
        """∇f(x_{t−1}, ξ_t) by parameter, as far as it has been evaluated for the coming step()."""
        return self._previous_point.grads

    @contextlib.contextmanager
    def previous_point(self) -> Iterator[None]:
        """Exact mode: gradients made inside are ∇f(x_{t−1}, ξ_t), which the next step() corrects with.

        Inside, the parameters hold x_{t−1}. On leaving, also after an exception, they are x_t again bit for bit, their
        `.grad` is what it was on entering, and the random number generators (Python's, NumPy's, torch's of the CPU
        and of the parameters' devices) stand where they stood, so that the evaluation at x_t draws the same dropout
        masks. An exception drops the gradients made inside. May be entered several times before one step(), as
        gradient accumulation does: the gradients add up. step() uses them up, zero_grad() drops them. At t = 1 the
        gradients made inside are dropped (x_0 = x_1, c_1 = g_1); `needs_previous_point` tells.

        Groups with exact=False stay at x_t.

        Source: arXiv:2411.10438, Algorithm 1.

        Raises:
            RuntimeError: no param_group has exact=True, or the context is already entered.
        """
        with self._previous_point.enter(self.param_groups, self.state):
            yield

    def forget_previous_point(self) -> None:
        """Drop the gradients made in `previous_point()`, as of an update that broke off."""
        self._previous_point.forget()

    # ---- groups ----

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, split into groups of one kind each.

        Args:
            param_group: as for `torch.optim.Optimizer`; every hyperparameter of the constructor may be set in it,
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
        by_role: dict[ParameterRole, list[Any]] = {}
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
                group["fused"] = takes_fused_kernel(group)
            super().add_param_group(group)
            self._count(self.param_groups[-1])
            for key in SPLIT_KEYS:  # which super() has just copied from the defaults
                self.param_groups[-1].pop(key, None)
            self._originals.add(self.param_groups[-1])

    def _count(self, group: dict[str, Any]) -> None:
        tensors, elements = self._sizes.get(group["kind"], (0, 0))
        numels = [getattr(param, "ds_numel", param.numel()) for param in group["params"]]  # of ZeRO-3's, or its own
        self._sizes[group["kind"]] = tensors + len(numels), elements + sum(numels)

    def _role(self, param: Tensor, settings: dict[str, Any]) -> ParameterRole:
        known = self._roles.get(param) if "_roles" in self.__dict__ else None
        guess = known or role_of_shape(param)
        role = ParameterRole(settings.get("kind", guess.kind), settings.get("layout", guess.layout))
        if role.kind == "matrix" and self.matrix_update == "shampoo" and dimensions(param) < 2:
            raise ValueError(
                f"kind='matrix' needs two or more dimensions to orthogonalise, got shape {tuple(param.shape)}"
            )
        if guess.kind == "matrix" and known is None and "kind" not in settings and self.matrix_update == "shampoo":
            self._guesses = True
        return role

    def _settings_of_kind(self, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        """The hyperparameters in which a group of `kind` differs from what the user set."""
        if kind == "1d" and not settings["optimize_1d"]:
            return {"update": "adamw", "lr": plain_rate(settings), **plain_adamw(settings)}
        return {"update": self.matrix_update}

    def __repr__(self) -> str:
        """The settings of every group, and of `fused` what is in effect."""
        lines = []
        for i, group in enumerate(self.param_groups):
            shown = {key: value for key, value in group.items() if key != "params"} | {"fused": fused_in_effect(group)}
            lines += [f"Parameter Group {i}", *(f"    {key}: {shown[key]}" for key in sorted(shown))]
        return "\n".join([f"{type(self).__name__} (", *lines, ")"])

    # ---- state dict ----

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with the version of its format under "hf_mars_format"."""
        return {**super().state_dict(), FORMAT_KEY: FORMAT}

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict() of the same optimizer class over the same groups.

        Raises:
            ValueError: it belongs to another optimizer, its groups do not match, or values in it are not allowed.
        """
        check_state_dict(state_dict, self.param_groups, type(self).__name__)
        super().load_state_dict(state_dict)
        load_dtypes(state_dict, self.param_groups, self.state)
