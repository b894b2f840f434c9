"""What each parameter is to MARS: a matrix, an embedding or "1d", and how a matrix is stored.

Decided once, when groups are made. `step()` never looks at shapes for it, since engines flatten and shard parameters
behind the optimizer's back; the answer travels in the param_group instead ("kind" and "layout").
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor, nn

Group = dict[str, Any]  # a param_group

KINDS = ("matrix", "embedding", "1d")
LAYOUTS = ("out_in", "in_out", "conv")


class ParameterRole(NamedTuple):
    """What one parameter is.

    Attributes:
        kind: "matrix", "embedding" (embeddings and output heads) or "1d" (fewer than two dimensions).
        layout: how its matrix is stored: "out_in" as in `torch.nn.Linear`, "in_out" as in GPT-2's `Conv1D`, "conv"
            for a convolution's (out, everything else). With the first two, three dimensions are a stack of matrices,
            more are a convolution.
    """

    kind: str
    layout: str = "out_in"


def role_of_shape(param: Tensor) -> ParameterRole:
    """The role of a parameter of which nothing but the shape is known."""
    return ParameterRole("1d" if dimensions(param) < 2 else "matrix")


def dimensions(param: Tensor) -> int:
    """How many dimensions a parameter has, also where DeepSpeed's ZeRO-3 has taken its values away (shape (0,))."""
    return len(getattr(param, "ds_shape", param.shape))


def check_not_flattened(param: Tensor) -> None:
    """Raise a ValueError for a parameter that FSDP1 has flattened: its shape tells nothing of what it was."""
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"params: FSDP1 has flattened a parameter (shape {tuple(param.shape)}); use FSDP2: "
            "torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate's configuration"
        )


# Output heads of classification models, which have no get_output_embeddings(); attribute names in transformers.
# PEFT trains a copy of them, where they are among its modules_to_save.
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|score|classifier|qa_outputs)(\.modules_to_save\.[^.]+)?$")
# Learnt position and class tokens that modules hold as bare parameters (position_embeddings, cls_token, pos_embed).
_BARE_EMBEDDINGS = re.compile(r"(^|\.)[^.]*(embed|token)[^.]*$")


def parameter_roles(model: nn.Module) -> dict[Tensor, ParameterRole]:
    """Read the role of every parameter of `model` off the module that holds it.

    Embeddings are the weights of `nn.Embedding` and of the output head (`get_output_embeddings()` where the model
    has it, else a linear layer named lm_head, embed_out, score, classifier or qa_outputs), tied ones once. Orientation
    comes from the module: transformers' `Conv1D` and expert stacks marked `is_transposed` store (in, out).
    """
    roles: dict[Tensor, ParameterRole] = {}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for prefix, module in model.named_modules():
        is_head = module is output or (isinstance(module, nn.Linear) and _HEADS.search(prefix) is not None)
        is_embedding = is_head or isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for name, param in module.named_parameters(recurse=False):
            if dimensions(param) < 2:
                role = ParameterRole("1d")
            elif is_embedding or (name != "weight" and _BARE_EMBEDDINGS.search(name)):
                role = ParameterRole("embedding")
            else:
                role = ParameterRole("matrix", _layout(module))
            # A tied weight is an embedding wherever it also serves, whichever module comes first.
            if param not in roles or role.kind == "embedding":
                roles[param] = role
    return roles


def _layout(module: nn.Module) -> str:
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    # By name, so that this package needs torch alone.
    is_gpt2_linear = any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in type(module).mro()
    )
    return "in_out" if is_gpt2_linear or getattr(module, "is_transposed", False) is True else "out_in"
