"""What FSDP2 keeps of gathered parameters."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def drop_gathered(params: list[Tensor]) -> None:
    """Make FSDP2 gather its parameters anew at their next use, for `params` have been changed under it.

    After a forward pass without a backward one (an evaluation) it keeps what it has gathered, and trusts it. Other
    models under FSDP2 only have to gather once more.
    """
    if any(isinstance(param, DTensor) for param in params):
        from torch.distributed._composable_state import _module_state_mapping  # nothing public leads there from params
        from torch.distributed.fsdp import FSDPModule

        for module in list(_module_state_mapping):
            if isinstance(module, FSDPModule):
                module.reshard()
