"""MarsTrainer's clip by the total norm: in the pass of the step where that is safe, else by torch's function."""

from __future__ import annotations

from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils import is_sagemaker_mp_enabled, logging

from ..optim.execution import why_composed
from ..optim.mars import Mars
from .callbacks import mars_optimizer
from .names import mars_name
from .skipping import check_finite

logger = logging.get_logger(__name__)

OTHER_ENGINES = (DistributedType.DEEPSPEED, DistributedType.XLA, DistributedType.MEGATRON_LM)


def clip(trainer: Trainer, model: nn.Module, max_norm: float, reasons: list[str]) -> Tensor | None:
    """The total norm of the gradients, whose clip the optimizer's next step takes along; None where torch is to clip.

    The log says why at INFO, once for each reason.

    Args:
        trainer: whose optimizer takes the step next.
        model: whose gradients are clipped.
        max_norm: largest norm; `math.inf` clips nothing.
        reasons: those that the log has said; gets the new one.

    Raises:
        NotFiniteError: see `hf_mars.trainer.skipping.check_finite`.
    """
    optimizer = mars_optimizer(trainer.optimizer)
    if optimizer is None:
        return None
    reason = why_not(trainer, model, optimizer)
    if reason is not None:
        if reason not in reasons:
            reasons.append(reason)
            logger.info(f"gradients are clipped by torch.nn.utils.clip_grad_norm_, in passes of its own: {reason}")
        return None
    if mars_name(trainer.args) is not None:
        check_finite(trainer, model)
    trainer.accelerator.unscale_gradients()
    return optimizer.clip_grad_norm_(max_norm)


def why_not(trainer: Trainer, model: nn.Module, optimizer: Mars) -> str | None:
    """Why the step cannot take the clip along; None where it can. The same on every rank."""
    if not getattr(trainer.args, "fuse_clip", True):
        return "fuse_clip=False"
    if any(group["exact"] for group in optimizer.param_groups):
        return "exact mode clips two gradients"
    engine = trainer.accelerator.distributed_type
    if engine in OTHER_ENGINES or is_sagemaker_mp_enabled():
        return "SageMaker clips" if engine not in OTHER_ENGINES else f"{engine.value} has gradients of its own"
    for group in optimizer.param_groups:
        if (reason := why_composed(group)) is not None:
            return reason
    for callback in trainer.callback_handler.callbacks:
        if _sees_gradients(callback):
            return f"{type(callback).__name__}.on_pre_optimizer_step may look at clipped gradients"
    own = {param for group in optimizer.param_groups for param in group["params"] if param.grad is not None}
    if own != {param for param in model.parameters() if param.grad is not None}:
        return "the parameters with gradients are not those of the optimizer"
    return None


def _sees_gradients(callback: TrainerCallback) -> bool:
    """Whether somebody else's code runs between the clip and the step."""
    method = type(callback).on_pre_optimizer_step
    return method is not TrainerCallback.on_pre_optimizer_step and not method.__module__.startswith("hf_mars.")
