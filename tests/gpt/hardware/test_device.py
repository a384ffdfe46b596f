"""What a card tells of the energy it used, with NVIDIA's library stood in for."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt.hardware import device as device_module
from gpt.hardware.device import read_energy_joules


class NVMLError(Exception):
    pass


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One card of UUID `u`, which has used 5,000 mJ."""
    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 5_000 if handle == "GPU-u" else 0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    properties = SimpleNamespace(uuid="u")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device_module._nvml_handle.cache_clear()
    yield library
    device_module._nvml_handle.cache_clear()


def test_a_card_s_counter_is_in_joules(card: Any) -> None:
    assert read_energy_joules(torch.device("cuda")) == 5.0


def test_what_does_not_tell_is_none(card: Any) -> None:
    assert read_energy_joules(torch.device("cpu")) is None

    def unsupported(_: str) -> int:
        raise NVMLError

    card.nvmlDeviceGetTotalEnergyConsumption = unsupported  # as a card older than Volta
    assert read_energy_joules(torch.device("cuda")) is None
    card.nvmlDeviceGetHandleByUUID = unsupported
    device_module._nvml_handle.cache_clear()
    assert read_energy_joules(torch.device("cuda")) is None
