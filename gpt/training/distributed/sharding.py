"""Spread a model over the devices of a process group with torch's own means: replicated
(`DistributedDataParallel`, Li et al. 2020, arXiv:2006.15704) or sharded (`fully_shard`, FSDP2; Zhao
et al. 2023, arXiv:2304.11277)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt.model.base import GPT
from gpt.training.distributed.process_group import ProcessGroup


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


def _is_sharded(part: Any) -> bool:
    """Whether a module or tensor is sharded. (`isinstance` needs imports that take over a second,
    which a run on one device saves.)"""
    return hasattr(part, "reshard") or hasattr(part, "placements")


def set_gradient_sync(model: Any, sync: bool) -> None:
    """Set whether the next forward and backward pass averages the gradients of all processes."""
    if _is_sharded(model):
        model.set_requires_gradient_sync(sync)
        model.set_is_last_backward(sync)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = sync  # what `no_sync` sets


def reshard(model: Any) -> None:
    """Free what a forward pass without a backward pass has gathered."""
    if _is_sharded(model):
        model.reshard()


def full_tensor(tensor: Any) -> Tensor:
    """Gather a tensor that may be sharded; every process must call this."""
    full: Tensor = tensor.full_tensor() if _is_sharded(tensor) else tensor
    return full


def load_full_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load full tensors into a model that may be sharded."""
    current = model.state_dict()
    model.load_state_dict({name: shard_like(t, current[name]) for name, t in tensors.items()})


def shard_like(tensor: Tensor, like: Any) -> Tensor:
    """Return this process's shard of a tensor that every process has in full, if `like` is
    sharded."""
    if not _is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)
