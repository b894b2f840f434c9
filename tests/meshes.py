"""One device mesh for all runs of a worker that would make equal ones.

gloo has threads for each process group that never sleep for long: a thousand threads, of a hundred runs with groups
of their own, leave the machine no time for anything else.
"""

import functools

import torch.distributed as dist
from torch.distributed import device_mesh

mesh_of = functools.cache(device_mesh.init_device_mesh)


def share_meshes():
    """Also those that accelerate and transformers make."""
    device_mesh.init_device_mesh = dist.init_device_mesh = mesh_of
