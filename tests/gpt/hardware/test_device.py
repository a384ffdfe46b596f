"""Which device is used, and what it reports: its energy, with a fake NVML, and full memory."""

from __future__ import annotations

import ctypes
import os
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
    return library


def test_energy_is_in_joules(gpu: Any) -> None:
    assert read_energy_joules(torch.device("cuda")) == 5.0


def test_energy_is_none_if_not_reported(gpu: Any) -> None:
    assert read_energy_joules(torch.device("cpu")) is None

    def unsupported(_: str) -> int:
        raise NVMLError

    gpu.nvmlDeviceGetTotalEnergyConsumption = unsupported  # like a GPU older than Volta
    assert read_energy_joules(torch.device("cuda")) is None
    gpu.nvmlDeviceGetHandleByUUID = unsupported
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


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two GPUs, the calls that set them up, and NVML, which answers the query of the fabric."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "restored after the test")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetGpuFabricInfoV=lambda handle, info: None,
        c_nvmlGpuFabricInfo_v2_t=ctypes.c_int,
    )
    calls = SimpleNamespace(current=[], fractions=[], nvml=nvml)
    monkeypatch.setattr(device_module, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.current.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * 2**30, 12 * 2**30))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: calls.fractions.append(given)
    )
    device_module._configure_allocator.cache_clear()
    yield calls
    device_module._configure_allocator.cache_clear()


@pytest.mark.parametrize(
    ("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)]
)
def test_chosen_gpu_becomes_the_current_one(cuda: Any, name: str, index: int) -> None:
    """Random states of a checkpoint are the current GPU's, and dropout draws on the model's."""
    assert [pick_device(name)] == cuda.current == [torch.device("cuda", index)]


def test_cpu_leaves_gpus_alone(cuda: Any) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert not cuda.current
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", "cuad", "cuda:-1", ""])
def test_name_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="supported"):
        pick_device(name)


def test_missing_gpu_is_a_config_error(cuda: Any) -> None:
    with pytest.raises(ConfigError, match=r"torch .* finds 2 CUDA devices"):
        pick_device("cuda:2")


def test_segments_are_expandable_and_memory_is_not_limited(cuda: Any) -> None:
    pick_device("cuda")
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert not cuda.fractions


def test_segments_are_not_expandable_without_the_fabric_state_of_nvml(cuda: Any) -> None:
    def missing(handle: int, info: Any) -> None:
        raise NVMLError

    cuda.nvml.nvmlDeviceGetGpuFabricInfoV = missing
    pick_device("cuda")
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("settings", ["max_split_size_mb:128", ""])
def test_allocator_settings_of_the_user_win(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, variable: str, settings: str
) -> None:
    monkeypatch.setenv(variable, settings)
    pick_device("cuda")
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    assert {n: os.environ[n] for n in names if n in os.environ} == {variable: settings}


def test_wsl_uses_free_memory_only(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver would spill the rest to system memory instead of refusing it."""
    release = "5.15.167.4-microsoft-standard-WSL2"
    monkeypatch.setattr(device_module.platform, "release", lambda: release)
    for _ in range(2):  # the second time, free memory is without what this process holds
        pick_device("cuda:1")
    assert cuda.fractions == [(0.75, torch.device("cuda:1"))]
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "per_process_memory_fraction:0.5")
    pick_device("cuda:0")
    assert len(cuda.fractions) == 1
