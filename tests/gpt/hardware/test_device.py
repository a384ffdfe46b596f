"""Which device is used, and what it reports: its energy, with a fake NVML, and full memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt.errors import ConfigError
from gpt.hardware import device as device_module
from gpt.hardware.device import is_out_of_memory, pick_device, read_energy_joules


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
    source = '"/pytorch/c10/cuda/CUDACachingAllocator.cpp":1407, please report a bug'
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory"))
    for message in (
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "No valid triton configs. OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you",
        f"NVML_SUCCESS == r INTERNAL ASSERT FAILED at {source}",
        f"NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at {source}",
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


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_chosen_gpu_becomes_the_current_one(
    monkeypatch: pytest.MonkeyPatch, name: str, index: int
) -> None:
    """Random states of a checkpoint are the current GPU's, and dropout draws on the model's."""
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [pick_device(name)] == current == [torch.device("cuda", index)]


def test_cpu_leaves_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delattr(torch.cuda, "set_device")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"torch .* finds 2 CUDA devices"):
        pick_device("cuda:2")
