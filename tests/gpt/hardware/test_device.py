"""What a device reports: its energy, with a fake NVML, and that its memory is full."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt.hardware import device as device_module
from gpt.hardware.device import is_out_of_memory, read_energy_joules


class NVMLError(Exception):
    pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One GPU of UUID `u`, which has used 5,000 mJ."""
    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5_000 if handle == "GPU-u" else 0,
    )
    monkeypatch.setattr(device_module, "pynvml", library)
    properties = SimpleNamespace(uuid="u")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device_module._nvml_handle.cache_clear()
    yield library
    device_module._nvml_handle.cache_clear()


def test_energy_is_in_joules(gpu: Any) -> None:
    assert read_energy_joules(torch.device("cuda")) == 5.0


def test_energy_is_none_if_not_reported(gpu: Any) -> None:
    assert read_energy_joules(torch.device("cpu")) is None

    def unsupported(_: str) -> int:
        raise NVMLError

    gpu.nvmlDeviceGetTotalEnergyConsumption = unsupported  # like a GPU older than Volta
    assert read_energy_joules(torch.device("cuda")) is None
    gpu.nvmlDeviceGetHandleByUUID = unsupported
    device_module._nvml_handle.cache_clear()
    assert read_energy_joules(torch.device("cuda")) is None


def test_allocation_that_fails_is_out_of_memory_in_all_its_forms() -> None:
    torch_source = '"/pytorch/c10/cuda/CUDACachingAllocator.cpp":1407, please report a bug'
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    for message in (
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "No valid triton configs. OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried",
        f"NVML_SUCCESS == r INTERNAL ASSERT FAILED at {torch_source}",
        f"NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at {torch_source}",
    ):
        assert is_out_of_memory(RuntimeError(message)), message


def test_other_errors_are_not_out_of_memory() -> None:
    for error in (
        ValueError("out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        # A kernel that never fits, however small the micro-batch is.
        RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376."),
        RuntimeError("Expected NVML_SUCCESS == nvmlDeviceGetGpuFabricInfoV_(&info) to be true"),
    ):
        assert not is_out_of_memory(error), error
