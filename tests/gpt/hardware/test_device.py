"""Energy that a GPU reports, with a fake NVML."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt.hardware import device as device_module
from gpt.hardware.device import read_energy_joules


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
