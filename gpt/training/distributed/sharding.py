"""How a network lies on the devices of a group, by torch's own means: whole on each
(`DistributedDataParallel`, Li et al. 2020, arXiv:2006.15704) or in shares (`fully_shard`, FSDP2;
Zhao et al. 2023, arXiv:2304.11277)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gpt.model.base import GPT
from gpt.training.distributed.process_group import ProcessGroup


def shard(model: GPT, group: ProcessGroup) -> None:
    """Keep this process's share of each parameter alone. The rest of a block is gathered when the
    block is reached, and let go of after it."""
    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (group.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    # The head is used after forward, by the loss: what is outside of blocks stays until backward.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def replicate(model: GPT) -> DistributedDataParallel:
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )


@contextmanager
def gradient_sync(network: nn.Module, exchange: bool) -> Iterator[None]:
    """Add up the gradients of all devices after the backward inside, or not yet."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(exchange)
        network.set_is_last_backward(exchange)
        yield
    elif isinstance(network, DistributedDataParallel) and not exchange:
        with network.no_sync():
            yield
    else:
        yield


def keeps_gradient_buckets(network: nn.Module) -> bool:
    """Whether gradients stay where they are between steps: in the buckets that are exchanged, of
    which there would be a second set else."""
    return isinstance(network, DistributedDataParallel)


def reshard(model: nn.Module) -> None:
    """Of what a forward without a backward gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may have a share; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load_full_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Whole tensors into a network that may be sharded."""
    here = model.state_dict()
    model.load_state_dict({name: shard_like(t, here[name]) for name, t in tensors.items()})


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor, which every process has, what this one keeps of `like`."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    there = tensor.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)
