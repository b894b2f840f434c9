"""Parameters spread over processes. The only package here that knows DTensor (FSDP2, HSDP, tensor parallelism),
DeepSpeed's ZeRO, and ranks.

A step works on plain local tensors: this process's part of each parameter. Elementwise work needs no communication.
Two services need whole parameters: `norms_of_wholes` (and `norms_of_squares`), for the clip, and `on_whole_matrices`,
for orthogonalisation.
"""

from .agreement import all_ranks_can, is_one_of_several
from .gathered import drop_gathered
from .matrices import on_whole_matrices
from .norms import add_up, norms_of_squares, norms_of_wholes, whole_value
from .parts import WHOLE, Part, Ranks, local_tensor, owners_of, part_of
from .zero import Originals

__all__ = [
    "WHOLE",
    "Originals",
    "Part",
    "Ranks",
    "add_up",
    "all_ranks_can",
    "drop_gathered",
    "is_one_of_several",
    "local_tensor",
    "norms_of_squares",
    "norms_of_wholes",
    "on_whole_matrices",
    "owners_of",
    "part_of",
    "whole_value",
]
