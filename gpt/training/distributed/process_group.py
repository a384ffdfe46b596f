"""The processes that train one network together, one a device, as torch's elastic launcher starts
them (`gpt.training.distributed.launch`). A run on one device is a group of one, for which all of
this is nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.errors import GPTError
from gpt.hardware.device import pick_device

T = TypeVar("T")

IS_MAIN_MACHINE = "OVERNIGHT_LEADS"
"""Set to 1 for the processes of the machine that keeps the run's records."""


@dataclass(frozen=True)
class ProcessGroup:
    rank: int = 0
    size: int = 1
    leader: int = 0
    """The rank that writes checkpoints and tells of the run."""

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def is_main_process(self) -> bool:
        return self.rank == self.leader

    def broadcast_from_main(self, decide: Callable[[], T]) -> T:
        """The leader's `decide()`, in every process; a `GPTError` that it raises likewise."""
        if self.alone:
            return decide()
        answer: list[Any] = [None, None]
        if self.is_main_process:
            try:
                answer[0] = decide()
            except GPTError as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=self.leader)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def any(self, flag: bool) -> bool:
        """Whether it is set in any of the processes. The device is not waited for."""
        if self.alone:
            return flag
        raised = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised.item())

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if not self.alone:
            dist.all_reduce(value)
        return value


SINGLE_PROCESS = ProcessGroup()


def join_process_group(device_type: str, timeout_seconds: float) -> ProcessGroup:
    """Meet the other processes, in one that the launcher started."""
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = os.environ.get(IS_MAIN_MACHINE) == "1" and os.environ["LOCAL_RANK"] == "0"
    is_main_process: list[Any] = [None] * size
    dist.all_gather_object(is_main_process, mine)
    return ProcessGroup(rank, size, is_main_process.index(True))


def local_device(name: str) -> torch.device:
    """The device that `hardware.device` names; in a group on GPUs each process has its own."""
    device = pick_device(name)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def leave_process_group() -> None:
    with suppress(RuntimeError):  # the others may be gone already
        dist.destroy_process_group()
