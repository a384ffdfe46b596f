"""The report of a preflight: what a run will need, whether it can work, and what to change.

It is computed from the config, the table of GPUs and the sizes of files; nothing is read, started
or run on a GPU. `Report` holds plain values; `gpt.preflight.render` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt.config.loading import build_config, merge_overrides, read_toml
from gpt.config.rules import HEAD_SPLIT_REMEDY
from gpt.config.schema import RunConfig
from gpt.errors import ConfigError, Problem
from gpt.hardware.flops import flops_per_token
from gpt.hardware.interconnect import DEFAULT_NETWORK_GBIT
from gpt.hardware.target_gpu import TargetGPU, find_target_gpu
from gpt.preflight.checks import CheckContext, disk_needed, find_problems, free_disk_bytes
from gpt.preflight.data_estimate import DataEstimate, estimate_data
from gpt.preflight.memory import Memory, Sharding, estimate_memory
from gpt.preflight.parameters import Parameters, count_parameters
from gpt.preflight.scaling import Scaling, estimate_scaling
from gpt.preflight.sharding import choose_sharding, fits_memory
from gpt.preflight.suggestions import (
    Suggestion,
    suggest_aligned_heads,
    suggest_head_splits,
    suggest_memory_savings,
)
from gpt.preflight.time import Throughput, estimate_throughput, total_tokens, training_hours
from gpt.preflight.warnings import find_warnings


@dataclass(frozen=True)
class Figures:
    """The numbers of a valid config."""

    config: RunConfig
    parameters: Parameters
    sharding: Sharding
    memory: Memory
    """Of one device with `sharding`."""
    fits: bool | None
    throughput: Throughput
    """Of one device."""
    data: DataEstimate
    disk: Mapping[str, int]
    free_disk_bytes: int | None
    scaling: Scaling | None
    """None with one device, or if GPU or throughput are unknown."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices, without overlap of communication and computation."""
        if self.config.hardware.world_size == 1:
            return self.throughput.tokens_per_second
        return self.config.tokens_per_step / self.scaling.step_seconds[1] if self.scaling else None

    @property
    def hours(self) -> float | None:
        """Training time on all devices, without overlap."""
        return training_hours(self.config, self.tokens_per_second)

    @property
    def epochs(self) -> float | None:
        tokens = self.data.train_tokens
        return total_tokens(self.config) / tokens if tokens else None


@dataclass(frozen=True)
class Report:
    path: str
    gpu: TargetGPU
    figures: Figures | None
    """None if the config is invalid; `problems` say why."""
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def blocked(self) -> bool:
        return bool(self.problems)

    def as_json(self) -> dict[str, Any]:
        """Return plain values. Unknown values, and all figures of an invalid config, are null."""
        return {
            "config": self.path,
            "gpu": self.gpu.name,
            "blocked": self.blocked,
            **(_figures_json(self.figures, self.gpu) if self.figures else _NO_FIGURES),
            "problems": [asdict(problem) for problem in self.problems],
            "warnings": [asdict(warning) for warning in self.warnings],
            "suggestions": [suggestion.as_json() for suggestion in self.suggestions],
        }


def run_preflight(
    path: str,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    gpu: str = "auto",
    starting: bool = False,
    network_gbit: float = DEFAULT_NETWORK_GBIT,
) -> Report:
    """Report on a config file. An invalid config is reported, not raised.

    `starting`: a run begins now on this machine, so missing sources block it; otherwise they are a
    warning. `network_gbit`: per machine, with several machines; `ConfigError` unless positive.
    """
    target = find_target_gpu(gpu)
    try:
        raw = merge_overrides(read_toml(Path(path)), overrides)
    except ConfigError as error:
        return Report(path, target, None, error.problems)
    return run_preflight_on_values(path, raw, target, starting, network_gbit)


def run_preflight_on_values(
    path: str,
    raw: Mapping[str, Any],
    target: TargetGPU,
    starting: bool = False,
    network_gbit: float = DEFAULT_NETWORK_GBIT,
) -> Report:
    """Report on the values of `path` with overrides applied."""
    try:
        config = build_config(raw)
    except ConfigError as error:
        unknown_gpu = (target.warning,) if target.warning else ()
        heads = _suggest_heads(error.problems, raw, target.memory_bytes)
        return Report(path, target, None, error.problems, unknown_gpu, heads)
    figures = _compute_figures(config, target, network_gbit)
    suggestions: list[Suggestion] = []
    if figures.fits is False and target.memory_bytes is not None:
        one_device = config.hardware.world_size == 1
        key = "training.batch_size" if one_device else "hardware.sharding"
        suggestions += suggest_memory_savings(key, config, target.memory_bytes)
    context = CheckContext(
        config=config,
        gpu=target,
        data=figures.data,
        memory=figures.memory,
        sharding=figures.sharding,
        starting=starting,
        memory_savings=tuple(suggestion.as_overrides() for suggestion in suggestions),
    )
    problems, warnings = tuple(find_problems(context)), tuple(find_warnings(context))
    if any(warning.key == "model.n_head" for warning in warnings):
        suggestions += suggest_aligned_heads("model.n_head", config, target.memory_bytes)
    return Report(path, target, figures, problems, warnings, tuple(suggestions))


def _compute_figures(config: RunConfig, target: TargetGPU, network_gbit: float) -> Figures:
    sharding, data = choose_sharding(config, target.memory_bytes), estimate_data(config)
    on_cpu = config.hardware.device == "cpu"
    throughput = (
        Throughput(None, "n/a: on a CPU") if on_cpu else estimate_throughput(config, target.spec)
    )
    rate = throughput.tokens_per_second
    return Figures(
        config=config,
        parameters=count_parameters(config.model),
        sharding=sharding,
        memory=estimate_memory(config, sharding),
        fits=None if on_cpu else fits_memory(config, target.memory_bytes),
        throughput=throughput,
        data=data,
        disk=disk_needed(config, data),
        free_disk_bytes=free_disk_bytes(config),
        scaling=estimate_scaling(config, sharding, target.spec, rate, network_gbit),
    )


def _suggest_heads(
    problems: Sequence[Problem], raw: Mapping[str, Any], memory_bytes: int | None
) -> tuple[Suggestion, ...]:
    """Suggest splits if `check_head_split` is what failed."""
    for problem in problems:
        if problem.remedy.startswith(HEAD_SPLIT_REMEDY):
            return tuple(suggest_head_splits(problem.key, raw, memory_bytes))
    return ()


# --- as JSON -------------------------------------------------------------------------------------


def _figures_json(figures: Figures, target: TargetGPU) -> dict[str, Any]:
    config, memory, scaling = figures.config, figures.memory, figures.scaling
    values = {
        "parameters": {"total": figures.parameters.total, **asdict(figures.parameters)},
        "memory": {
            "peak_bytes": memory.peak_bytes,
            "needed_bytes": memory.needed_bytes,
            **asdict(memory),
            "card_bytes": target.memory_bytes,
            "fits": figures.fits,
        },
        "tokens_per_step": config.tokens_per_step,
        "steps": config.training.max_steps,
        "tokens": total_tokens(config),
        "flops_per_token": flops_per_token(config),
        "tokens_per_second": figures.tokens_per_second,
        "hours": figures.hours,
        "basis": figures.throughput.basis,
        "data": {
            "train_tokens": figures.data.train_tokens,
            "validation_tokens": figures.data.validation_tokens,
            "epochs": figures.epochs,
            "basis": figures.data.basis,
        },
        "disk": {**figures.disk, "free": figures.free_disk_bytes},
    }
    if config.hardware.world_size > 1:
        values["scaling"] = scaling.as_json(config.training.max_steps) if scaling else None
    return values


_NO_FIGURES: dict[str, Any] = dict.fromkeys(
    (
        *("parameters", "memory", "tokens_per_step", "steps", "tokens", "flops_per_token"),
        *("tokens_per_second", "hours", "basis", "data", "disk"),
    )
)
