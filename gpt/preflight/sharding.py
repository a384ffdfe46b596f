"""Whether each device holds the whole model (ddp) or a share of it (fsdp)."""

from __future__ import annotations

from gpt.config.schema import RunConfig
from gpt.hardware.target_gpu import find_target_gpu
from gpt.preflight.memory import Sharding, estimate_memory


def allowed_shardings(config: RunConfig) -> tuple[Sharding, ...]:
    """Return what `hardware.sharding` allows, the preferred one first. One device has no choice."""
    setting = config.hardware.sharding
    if config.hardware.world_size == 1:
        return ("ddp",)
    return ("ddp", "fsdp") if setting == "auto" else (setting,)


def choose_sharding(config: RunConfig, memory_bytes: int | None) -> Sharding:
    """Return the first allowed sharding that fits; if none does, the one that needs least memory.

    `memory_bytes`: total memory of one device; None if unknown, as on a CPU: then "auto" is ddp.
    """
    allowed = allowed_shardings(config)
    if memory_bytes is None or len(allowed) == 1:
        return allowed[0]
    needed = {sharding: estimate_memory(config, sharding).needed_bytes for sharding in allowed}
    fitting = [sharding for sharding in allowed if needed[sharding] <= memory_bytes]
    return fitting[0] if fitting else min(allowed, key=lambda sharding: needed[sharding])


def fits_memory(config: RunConfig, memory_bytes: int | None) -> bool | None:
    """Return whether a device of that memory holds its part of the run; None without a device."""
    if memory_bytes is None:
        return None
    return any(
        estimate_memory(config, sharding).needed_bytes <= memory_bytes
        for sharding in allowed_shardings(config)
    )


def resolve_sharding(config: RunConfig) -> RunConfig:
    """Replace `hardware.sharding = "auto"` by the value that this machine's GPUs call for."""
    if config.hardware.sharding != "auto" or config.hardware.world_size == 1:
        return config
    on_cpu = config.hardware.device == "cpu"
    chosen = choose_sharding(config, None if on_cpu else find_target_gpu().memory_bytes)
    return config.model_copy(
        update={"hardware": config.hardware.model_copy(update={"sharding": chosen})}
    )
