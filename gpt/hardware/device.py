"""Torch devices: which one to use, the dtype it multiplies in, its memory and energy."""

import os
import platform
import re
import resource
import sys
from ctypes import byref
from functools import cache

import pynvml
import torch

from gpt.config.schema import DEVICE_PATTERN
from gpt.errors import ConfigError, Problem
from gpt.hardware.target_gpu import InstalledGPU, installed_gpus

OUT_OF_MEMORY = re.compile(
    "out of memory"  # CUDA's runtime and driver, Triton, and errors of the compiler that quote them
    "|_ALLOC_FAILED"  # cuBLAS and its sisters, which allocate their workspace outside of torch
    "|can't allocate memory"  # torch on a CPU
    # torch asks NVML who uses the memory before it reports that there is none left
    "|NVML_SUCCESS == .* INTERNAL ASSERT FAILED at .*CUDACachingAllocator",
    re.IGNORECASE,
)
"""Messages of a `RuntimeError` for an allocation that failed."""


def pick_device(name: str) -> torch.device:
    """Return the device that `hardware.device` names. A GPU becomes torch's current one, of which
    random states and supported dtypes are asked, and its allocator is set up.

    Raises `ConfigError` if it does not exist."""
    if not re.fullmatch(DEVICE_PATTERN, name):
        rule = "only CUDA GPUs and the CPU are supported"
        remedy = 'use "auto", "cpu", "cuda" or e.g. "cuda:1"'
        raise ConfigError(Problem("hardware.device", name, rule, remedy))
    if not names_gpu(name):
        return torch.device("cpu")
    index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        rule = f"does not exist: torch {torch.__version__} finds {count} CUDA devices"
        remedy = 'use "auto" or "cpu", or install the CUDA build of torch and the driver'
        raise ConfigError(Problem("hardware.device", name, rule, remedy))
    device = torch.device("cuda", index)
    _configure_allocator(device)
    torch.cuda.set_device(device)
    return device


def names_gpu(name: str) -> bool:
    """Whether `hardware.device` names a GPU: "auto" does if there is one."""
    return name.startswith("cuda") or (name == "auto" and torch.cuda.device_count() > 0)


@cache
def _configure_allocator(device: torch.device) -> None:
    """Set up torch's caching allocator before the first use of CUDA, which reads the variable.

    Expandable segments fragment less, which leaves more of a small GPU's memory usable. Under WSL2
    their first allocation can fail (github.com/pytorch/pytorch/issues/192330). There, the driver
    puts what does not fit into system memory, which is many times slower, instead of refusing it:
    so torch refuses what exceeds the memory that is free now. Settings of the user win.
    """
    on_wsl = "microsoft" in platform.release().lower()
    settings = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    if settings is None and not on_wsl and _have_fabric_state():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if on_wsl and "per_process_memory_fraction" not in (settings or ""):
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(free / total, device)


def _have_fabric_state() -> bool:
    """Whether NVML reports the fabric state of each GPU, which torch asserts for expandable
    segments."""
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceGetGpuFabricInfoV(handle, byref(pynvml.c_nvmlGpuFabricInfo_v2_t()))
    except pynvml.NVMLError:
        return False
    return True


def compute_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """Return the dtype of matrix products: on CUDA the config's, with float16 for bfloat16 if the
    GPU lacks it; on a CPU always float32."""
    if device.type == "cpu":
        return torch.float32
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    lower: torch.dtype = getattr(torch, dtype)
    return lower


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return a context that runs matrix products in `compute_dtype`."""
    chosen = compute_dtype(device, dtype)
    lower = chosen != torch.float32
    return torch.autocast(device.type, dtype=chosen if lower else None, enabled=lower)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on the GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def release_memory(device: torch.device) -> None:
    """After out of memory: free what torch's allocator holds unused, and forget the peak of the
    attempt that failed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak so far: of torch's allocations on a GPU, of the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes if sys.platform == "darwin" else kibibytes * 1024


def read_energy_joules(device: torch.device) -> float | None:
    """Return the energy that the GPU has used since its driver was loaded. None for a CPU and for a
    GPU older than Volta."""
    return _read_thousandths(device, "nvmlDeviceGetTotalEnergyConsumption")


def read_power_limit_watts(device: torch.device) -> float | None:
    """Return the power that the driver allows the GPU; None for a CPU, or if it does not say."""
    return _read_thousandths(device, "nvmlDeviceGetEnforcedPowerLimit")


def _read_thousandths(device: torch.device, function: str) -> float | None:
    """Return what a function of NVML reports in thousandths, e.g. millijoules. The GPU is found by
    its UUID, because CUDA_VISIBLE_DEVICES changes its index."""
    if device.type != "cuda":
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return float(getattr(pynvml, function)(handle)) / 1000
    except pynvml.NVMLError:
        return None


def describe_device(device: torch.device) -> InstalledGPU:
    """Return what NVML says of a device; for a CPU, torch's version in place of the driver's."""
    if device.type == "cpu":
        return InstalledGPU("CPU", 0, 0, "cpu", torch.__version__)
    found = torch.cuda.get_device_properties(device)
    without_nvml = InstalledGPU(found.name, found.total_memory, 0, str(found.uuid), "unknown")
    return next((gpu for gpu in installed_gpus() if gpu.uuid == str(found.uuid)), without_nvml)
