"""Where tensors live, and in which type they are multiplied."""

from __future__ import annotations

import resource
import sys

import torch

from gpt.errors import ConfigError, Problem

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Matrix products in `dtype` on CUDA; a CPU always computes in float32."""
    lower = device.type == "cuda" and dtype != "float32"
    return torch.autocast(device.type, dtype=DTYPES[dtype] if lower else None, enabled=lower)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: torch's allocations on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes if sys.platform == "darwin" else kibibytes * 1024
