"""Where tensors live, and in which type they are multiplied."""

from __future__ import annotations

import resource
import sys
from functools import cache
from typing import Any

import torch

from gpt.errors import ConfigError, Problem

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def pick_device(name: str) -> torch.device:
    """The device that `hardware.device` names. Raises `ConfigError` for one that is not there."""
    found = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(
            Problem(
                "hardware.device",
                name,
                f"torch {torch.__version__} sees {found} CUDA devices on this machine",
                'use "auto" or "cpu", or install the CUDA build of torch and the driver',
            )
        )
    return device


def compute_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """The type of matrix products: the config's on CUDA, float16 for bfloat16 where the card has
    no bfloat16; a CPU always computes in float32."""
    if device.type == "cpu":
        return torch.float32
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return DTYPES[dtype]


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Matrix products in `compute_dtype`, everything that needs it in float32."""
    chosen = compute_dtype(device, dtype)
    lower = chosen != torch.float32
    return torch.autocast(device.type, dtype=chosen if lower else None, enabled=lower)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's allocator, or the CPU's, had no more to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: torch's allocations on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes if sys.platform == "darwin" else kibibytes * 1024


def read_energy_joules(device: torch.device) -> float | None:
    """What the card has used since its driver was loaded; None for a CPU, for a card older than
    Volta, and where nvidia-ml-py is not installed."""
    if device.type != "cuda":
        return None
    handle = _nvml_handle(str(torch.cuda.get_device_properties(device).uuid))
    if handle is None:
        return None
    import pynvml

    try:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000  # millijoules
    except pynvml.NVMLError:
        return None


@cache
def _nvml_handle(uuid: str) -> Any:
    """By UUID, because CUDA_VISIBLE_DEVICES changes the numbers."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except ImportError:
        return None
    except pynvml.NVMLError:
        return None
