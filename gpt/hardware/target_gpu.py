"""The GPU that a preflight is for: one given by name, or the first one of this machine."""

import difflib
from dataclasses import dataclass
from functools import cache

import pynvml

from gpt.errors import Problem
from gpt.hardware.gpus import GPUS, GPUSpec, find_gpu


@dataclass(frozen=True)
class TargetGPU:
    """Without `memory_bytes` nothing is said about memory; without `spec` nothing about time."""

    name: str
    spec: GPUSpec | None
    memory_bytes: int | None
    free_bytes: int | None = None
    is_named: bool = False
    """Whether the user gave its name; it need not be in this machine then."""
    installed: int = 0
    """GPUs in this machine; 0 if the user gave a name."""

    @property
    def warning(self) -> Problem | None:
        """A name given by the user that is not in the table of GPUs."""
        if not self.is_named or self.spec:
            return None
        key, keys = self.name.lower().replace(" ", "-"), [spec.key for spec in GPUS]
        near = " or ".join(difflib.get_close_matches(key, keys, n=3, cutoff=0.4))
        rule = (
            "is not in the table of GPUs (gpt/hardware/gpus.csv), so memory fit and hours are n/a"
        )
        remedy = f"did you mean {near}?" if near else "use a name like rtx-4070, or auto"
        return Problem("--gpu", self.name, rule, remedy)


def find_target_gpu(gpu: str = "auto") -> TargetGPU:
    """Return the GPU called `gpu`, or for "auto" the first one of this machine, if there is one."""
    if gpu != "auto":
        spec = find_gpu(gpu)
        return TargetGPU(gpu, spec, spec.memory_bytes if spec else None, is_named=True)
    installed = installed_gpus()
    if not installed:
        return TargetGPU("no GPU", None, None)
    first = installed[0]
    spec = find_gpu(first.name, first.memory_bytes)
    free_bytes, count = first.free_bytes, len(installed)
    return TargetGPU(first.name, spec, first.memory_bytes, free_bytes, installed=count)


@dataclass(frozen=True)
class InstalledGPU:
    name: str
    memory_bytes: int
    free_bytes: int
    uuid: str = ""
    driver: str = ""


@cache
def installed_gpus() -> tuple[InstalledGPU, ...]:
    """Return the GPUs of this machine by NVML (importing torch would take seconds); none without
    NVIDIA's driver."""
    try:
        pynvml.nvmlInit()
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [(str(pynvml.nvmlDeviceGetName(h)), *_memory(h)) for h in handles]
        uuids = [str(pynvml.nvmlDeviceGetUUID(h)).removeprefix("GPU-") for h in handles]
    except pynvml.NVMLError:
        return ()
    return tuple(InstalledGPU(*name, uuid, driver) for name, uuid in zip(names, uuids, strict=True))


def _memory(handle: object) -> tuple[int, int]:
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:  # a GPU that shares the CPU's memory reports none
        return 0, 0
    return int(memory.total), int(memory.free)
