"""MarsTrainer's clip by the total norm: in the pass of the step where that is safe, else by torch's function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from transformers import Trainer, TrainerCallback
from transformers.utils import is_sagemaker_mp_enabled, logging

from ..optim.execution import why_composed
from ..optim.mars import Mars
from .callbacks import mars_optimizer
from .names import mars_name
from .skipping import check_finite

logger = logging.get_logger(__name__)

OTHER_ENGINES = (DistributedType.DEEPSPEED, DistributedType.XLA, DistributedType.MEGATRON_LM)


class Clipping:
    """How one trainer clips.

    Processes must choose alike, or one would wait in torch's clip and the others in ours, and under DDP their factors
    would be rounded differently. Arguments, callbacks and the compiled step may differ between processes: they ask
    each other once for each training. The parameters that require gradients are the same in all of them.

    Attributes:
        reasons: why torch has clipped, each once, as the log says.
    """

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.begin()

    def begin(self) -> None:
        """Training begins: the processes have yet to ask each other."""
        self._has_asked, self._reason = False, None

    def clip(self, trainer: Trainer, model: nn.Module, max_norm: float) -> Tensor | None:
        """The total norm of the gradients, whose clip the optimizer's next step takes along; None where torch is to.

        The log says why at INFO, once for each reason.

        Args:
            trainer: whose optimizer takes the step next.
            model: whose gradients are clipped.
            max_norm: largest norm; `math.inf` clips nothing.

        Raises:
            NotFiniteError: see `hf_mars.trainer.skipping.check_finite`.
            RuntimeError: one of several processes has got a callback since training began that may look at clipped
                gradients.
        """
        optimizer = mars_optimizer(trainer.optimizer)
        if optimizer is None:
            return None
        reason = self._why_not(trainer, model, optimizer)
        if reason is not None:
            if reason not in self.reasons:
                self.reasons.append(reason)
                doing = "gradients are clipped by torch.nn.utils.clip_grad_norm_, in passes of its own"
                if math.isinf(max_norm):
                    doing = "the norm of the gradients is measured by torch, in a pass of its own"
                logger.info(f"{doing}: {reason}")
            return None
        if mars_name(trainer.args) is not None:
            check_finite(trainer, model)
        trainer.accelerator.unscale_gradients()
        return optimizer.clip_grad_norm_(max_norm)

    def _why_not(self, trainer: Trainer, model: nn.Module, optimizer: Mars) -> str | None:
        """Why the step cannot take the clip along; None where it can. The same in all processes."""
        engine = trainer.accelerator.distributed_type
        if engine in OTHER_ENGINES or is_sagemaker_mp_enabled():
            return "SageMaker clips" if engine not in OTHER_ENGINES else f"{engine.value} has gradients of its own"
        reason = _why_not_here(trainer, optimizer)
        if trainer.accelerator.num_processes > 1:
            if not self._has_asked:
                self._has_asked = True
                self._reason = next((other for other in gather_object([reason]) if other is not None), None)
            elif reason is not None and self._reason is None:
                raise RuntimeError(
                    f"{reason}, since training began, and other processes may not know of it: add callbacks before "
                    "train(), or set fuse_clip=False"
                )
            reason = self._reason
        if reason is not None:
            return reason
        # Not by their gradients: of a flat tensor, a process that holds nothing of a parameter has none.
        own = {param for group in optimizer.param_groups for param in group["params"] if param.requires_grad}
        if own != {param for param in model.parameters() if param.requires_grad}:
            return "the parameters that require gradients are not those of the optimizer"
        return None


def _why_not_here(trainer: Trainer, optimizer: Mars) -> str | None:
    """Why the step cannot take the clip along, for a reason that other processes need not have."""
    if not getattr(trainer.args, "fuse_clip", True):
        return "fuse_clip=False"
    if any(group["exact"] for group in optimizer.param_groups):
        return "exact mode clips two gradients"
    for group in optimizer.param_groups:
        if (reason := why_composed(group)) is not None:
            return reason
    if (seer := next(_who_sees_gradients(trainer, optimizer), None)) is not None:
        return f"{seer} may look at clipped gradients"
    return None


def _who_sees_gradients(trainer: Trainer, optimizer: Mars) -> Iterator[str]:
    """Somebody else's code that runs between the clip and the end of the update, by name."""
    for callback in trainer.callback_handler.callbacks:
        for event in ("on_pre_optimizer_step", "on_optimizer_step"):
            method = getattr(callback, event)
            if getattr(method, "__func__", method) is not getattr(TrainerCallback, event) and not _is_ours(method):
                yield f"{type(callback).__name__}.{event}"
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    hooks += [*_global_optimizer_pre_hooks.values(), *_global_optimizer_post_hooks.values()]
    for hook in hooks:
        if not _is_ours(hook):
            yield f"the hook {getattr(hook, '__qualname__', type(hook).__name__)} of step()"
    if not _is_ours(trainer._get_grad_norm):
        yield f"{type(trainer).__name__}._get_grad_norm"


def _is_ours(function: Callable[..., Any]) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("hf_mars.")
