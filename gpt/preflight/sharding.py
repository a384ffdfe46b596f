"""Whether each device holds the whole model (ddp) or a share of it (fsdp)."""

from __future__ import annotations

from gpt.config.schema import RunConfig
from gpt.hardware.target_gpu import find_target_gpu
from gpt.preflight.memory import Sharding, estimate_memory


def choose_sharding(config: RunConfig, memory_bytes: int | None) -> Sharding:
    """Return what `hardware.sharding` asks for; for "auto" ddp if it fits or needs less, else fsdp.

    `memory_bytes`: total memory of one device; None if unknown, as on a CPU: then "auto" is ddp.
    """
    setting = config.hardware.sharding
    if config.hardware.world_size == 1:
        return "ddp"
    if setting != "auto":
        return setting
    if memory_bytes is None:
        return "ddp"
    ddp, fsdp = estimate_memory(config, "ddp"), estimate_memory(config, "fsdp")
    return "ddp" if ddp.needed_bytes <= max(fsdp.needed_bytes, memory_bytes) else "fsdp"


def fits_memory(config: RunConfig, memory_bytes: int | None) -> bool | None:
    """Return whether a device of that memory holds its part of the run; None without a device."""
    if memory_bytes is None:
        return None
    sharding = choose_sharding(config, memory_bytes)
    return estimate_memory(config, sharding).needed_bytes <= memory_bytes


def resolve_sharding(config: RunConfig) -> RunConfig:
    """Replace `hardware.sharding = "auto"` by the value that this machine's GPUs call for."""
    if config.hardware.sharding != "auto" or config.hardware.world_size == 1:
        return config
    on_cpu = config.hardware.device == "cpu"
    chosen = choose_sharding(config, None if on_cpu else find_target_gpu().memory_bytes)
    return config.model_copy(
        update={"hardware": config.hardware.model_copy(update={"sharding": chosen})}
    )
