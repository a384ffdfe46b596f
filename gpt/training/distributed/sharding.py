"""Spread a model over the devices of a process group with torch's own means: replicated
(`DistributedDataParallel`, Li et al. 2020, arXiv:2006.15704) or sharded (`fully_shard`, FSDP2; Zhao
et al. 2023, arXiv:2304.11277)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt.model.base import GPT
from gpt.training.distributed.process_group import ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def apply_fsdp(model: GPT, group: ProcessGroup) -> None:
    """Keep only this process's shard of each parameter. A block is gathered when it is reached, and
    resharded after it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device_type = next(model.parameters()).device.type
    mesh = init_device_mesh(device_type, (group.world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    # The loss uses the head after forward, so parameters outside of blocks stay until backward.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def apply_ddp(model: GPT) -> DistributedDataParallel:
    """Keep the whole model on each device."""
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def _is_fsdp(model: nn.Module) -> TypeGuard[FSDPModule]:
    # Importing FSDP2 takes over a second, which a run on one device saves.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


@contextmanager
def gradient_sync(model: nn.Module, sync: bool) -> Iterator[None]:
    """Average the gradients of all processes after the backward pass in this block, if `sync`."""
    if _is_fsdp(model):
        model.set_requires_gradient_sync(sync)
        model.set_is_last_backward(sync)
        yield
    elif isinstance(model, DistributedDataParallel) and not sync:
        with model.no_sync():
            yield
    else:
        yield


def keeps_gradient_buckets(model: nn.Module) -> bool:
    """Whether gradients stay allocated between steps: DDP's are views of its buckets, and setting
    them to None would allocate a second set."""
    return isinstance(model, DistributedDataParallel)


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has gathered."""
    if _is_fsdp(model):
        model.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; every process must call this."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def load_full_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load full tensors into a model that may be sharded."""
    current = model.state_dict()
    model.load_state_dict({name: shard_like(t, current[name]) for name, t in tensors.items()})


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a tensor that every process has in full, if `like` is
    sharded."""
    if not _is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
