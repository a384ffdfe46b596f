"""Whether each device holds the whole model (ddp) or its share of it (fsdp)."""

from __future__ import annotations

from gpt.config.schema import RunConfig
from gpt.errors import ConfigError, Problem
from gpt.hardware.gpus import GIB
from gpt.preflight.layout import Layout, Sharding, devices_of, layouts_of
from gpt.preflight.memory import estimate_memory
from gpt.preflight.suggestions import smaller


def choose_sharding(config: RunConfig, memory_bytes_of_device: int | None) -> Sharding:
    """What training does: hardware.sharding, and for "auto" ddp where the memory model says that
    it fits a device, else fsdp.

    `memory_bytes_of_device`: all of a device's memory; None where that is unknown, as on a CPU:
    then "auto" is ddp. One device is not judged: it makes its micro-batches smaller by itself.
    Raises `ConfigError` where the run fits in no way that hardware.sharding allows.
    """
    problem = misfit(config, memory_bytes_of_device)
    if problem:
        raise ConfigError(problem)
    return choose_layout(config, memory_bytes_of_device).sharding


def choose_layout(config: RunConfig, memory_bytes: int | None) -> Layout:
    """The first that fits; where none does, the one that takes least."""
    layouts = layouts_of(config)
    if memory_bytes is None or len(layouts) == 1:
        return layouts[0]
    needed = {layout: estimate_memory(config, layout).needed_bytes for layout in layouts}
    fitting = [layout for layout in layouts if needed[layout] <= memory_bytes]
    return fitting[0] if fitting else min(layouts, key=lambda layout: needed[layout])


def misfit(config: RunConfig, memory_bytes: int | None) -> Problem | None:
    """What keeps a run on many devices from fitting them; None for one, and where it fits."""
    devices, asked = devices_of(config), config.hardware.sharding
    if devices == 1 or memory_bytes is None or config.hardware.device == "cpu":
        return None
    layout = choose_layout(config, memory_bytes)
    needed = estimate_memory(config, layout).needed_bytes
    if needed <= memory_bytes:
        return None
    return Problem(
        "hardware.sharding",
        asked,
        f"needs {needed / GIB:.1f} GiB on each of {devices} devices with {layout.sharding}, "
        f"and one has {memory_bytes / GIB:.1f} GiB",
        _remedy(config, memory_bytes),
    )


def _remedy(config: RunConfig, memory_bytes: int) -> str:
    sharded = Layout(devices_of(config), "fsdp")
    fits_sharded = estimate_memory(config, sharded).needed_bytes <= memory_bytes
    if config.hardware.sharding == "ddp" and fits_sharded:
        return 'set hardware.sharding to "auto" or "fsdp"'
    ways = [way.as_overrides() for way in smaller("training.batch_size", config, memory_bytes)]
    if ways:
        return f"set {', or '.join(ways)}"
    return "take more devices, a smaller model, or a larger card"
