"""What the param_groups that a group of the user's is split into are set to."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _foreach_utils

# Settings that say how a group of the user's is split; what they decide stands in the resulting groups' own lr, betas…
SPLIT_KEYS = ("lr_1d", "betas_1d", "optimize_1d", "orthogonalize_embeddings")


def settings_among(arguments: dict[str, Any]) -> dict[str, Any]:
    """A constructor's arguments that are settings of param_groups."""
    others = ("self", "params", "roles", "process_group", "__class__")
    return {name: value for name, value in arguments.items() if name not in others}


def plain_rate(settings: dict[str, Any]) -> float | Tensor:
    """The learning rate of what gets no matrix update: `lr_1d`; by default lr where that is AdamW's own, else lr/2."""
    if settings["lr_1d"] is not None:
        return settings["lr_1d"]
    return settings["lr"] if settings.get("adjust_lr_fn") == "match_rms_adamw" else settings["lr"] / 2


def plain_adamw(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with which a group gets AdamW, uncorrected and unclipped."""
    return {"betas": settings["betas_1d"], "gamma": 0.0, "max_norm": None}


def takes_fused_kernel(group: dict[str, Any]) -> bool:
    """Whether torch's fused AdamW, the fastest, can run on these parameters. Parameters on "meta" move later."""
    # Without torch's list, which is private, its kernels choose for themselves.
    devices = {*getattr(_foreach_utils, "_get_fused_kernels_supported_devices", list)(), "meta"}
    tensors = [param[1] if isinstance(param, tuple) else param for param in group["params"]]
    return group["foreach"] is None and all(t.device.type in devices and t.is_floating_point() for t in tensors)
