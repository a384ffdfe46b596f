"""The processes that train one model together, one per device, started by torch's elastic launcher
(`gpt.training.distributed.launch`). On one device, the group is a single process and its operations
do nothing."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.errors import GPTError
from gpt.hardware.device import names_gpu, pick_device

T = TypeVar("T")

IS_MAIN_MACHINE = "OVERNIGHT_MAIN_MACHINE"
"""Environment variable: 1 in the processes of the machine that keeps the run's records."""


@dataclass(frozen=True)
class ProcessGroup:
    rank: int = 0
    world_size: int = 1
    main_rank: int = 0
    """The process that writes checkpoints and reports records."""

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == self.main_rank

    def broadcast_from_main(self, compute: Callable[[], T]) -> T:
        """Return the main process's `compute()`, or raise its `GPTError`, in every process."""
        if not self.is_distributed:
            return compute()
        answer: list[Any] = [None, None]
        if self.is_main_process:
            try:
                answer[0] = compute()
            except GPTError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=self.main_rank)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. Does not wait for the device."""
        if not self.is_distributed:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum `tensor` over the processes, in place."""
        if self.is_distributed:
            dist.all_reduce(tensor)


SINGLE_PROCESS = ProcessGroup()


def join_process_group(device_type: str, timeout_seconds: float) -> ProcessGroup:
    """Join the other processes, in one that the launcher has started."""
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    is_main = os.environ.get(IS_MAIN_MACHINE) == "1" and os.environ["LOCAL_RANK"] == "0"
    are_main: list[Any] = [None] * world_size
    dist.all_gather_object(are_main, is_main)
    return ProcessGroup(rank, world_size, are_main.index(True))


def local_device(name: str) -> torch.device:
    """Return the device that `hardware.device` names; each process of a group has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    return pick_device(f"cuda:{rank}" if rank and names_gpu(name) else name)
