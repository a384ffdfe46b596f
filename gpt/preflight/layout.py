"""How many devices share a run, and what each of them holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpt.config.schema import RunConfig

Sharding = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Layout:
    """`devices` of all machines together. One device has nothing to share, whatever it says."""

    devices: int
    sharding: Sharding

    @property
    def shares(self) -> bool:
        """Whether a device holds less than the whole model."""
        return self.devices > 1 and self.sharding == "fsdp"

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients keep their place through the whole step."""
        return self.devices > 1 and self.sharding == "ddp"

    def share(self, count: int) -> int:
        """What one device holds of something that is shared out where anything is."""
        return -(-count // self.devices) if self.shares else count


ONE_DEVICE = Layout(1, "ddp")


def devices_of(config: RunConfig) -> int:
    """Devices of all machines together."""
    return config.hardware.devices * config.hardware.nodes


def layouts_of(config: RunConfig) -> tuple[Layout, ...]:
    """Those that hardware.sharding allows, the one to be preferred first."""
    devices, asked = devices_of(config), config.hardware.sharding
    if devices == 1:
        return (ONE_DEVICE,)
    kinds: tuple[Sharding, ...] = ("ddp", "fsdp") if asked == "auto" else (asked,)
    return tuple(Layout(devices, kind) for kind in kinds)
