"""The report: what a run will take, whether it can work, and what to change where not.

Computed from the config, the table of cards and a look at the files; nothing is read, started or
asked of a GPU. `Report` is plain values; `gpt.preflight.render` shows it to people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpt.config.loading import build_config, merge_overrides, read_toml
from gpt.config.schema import RunConfig
from gpt.errors import ConfigError, Problem
from gpt.hardware.flops import flops_per_token
from gpt.hardware.interconnect import DEFAULT_NETWORK_GBIT
from gpt.preflight.checks import PROBLEMS, WARNINGS, CheckContext, disk_needed, free_disk_bytes
from gpt.preflight.data_estimate import DataEstimate, estimate_data
from gpt.preflight.layout import ONE_DEVICE, Layout
from gpt.preflight.measured_pace import find_measured_throughput
from gpt.preflight.memory import Memory, estimate_memory
from gpt.preflight.parameters import Parameters, count_parameters
from gpt.preflight.scaling import Scaling, estimate_scaling
from gpt.preflight.sharding import choose_layout
from gpt.preflight.suggestions import (
    Suggestion,
    fits,
    smaller,
    suggest_aligned_heads,
    suggest_head_splits,
)
from gpt.preflight.target import TargetGPU, find_target_gpu
from gpt.preflight.time import Throughput, estimate_throughput, hours, total_tokens


@dataclass(frozen=True)
class Figures:
    """What a config that is right comes to."""

    config: RunConfig
    parameters: Parameters
    memory: Memory
    fits: bool | None
    pace: Throughput
    data: DataEstimate
    disk: Mapping[str, int]
    free_disk_bytes: int | None
    layout: Layout = ONE_DEVICE
    """Of the devices that `memory` and `fits` are of."""
    scaling: Scaling | None = None
    """None with one device, and where card or pace are not known."""

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices, with no exchange hidden."""
        if self.layout.devices == 1:
            return self.pace.tokens_per_second
        seconds = self.scaling.step_seconds_exposed if self.scaling else None
        return self.config.tokens_per_step / seconds if seconds else None

    @property
    def hours(self) -> float | None:
        """Of training on all devices, with no exchange hidden."""
        return hours(self.config, Throughput(self.tokens_per_second, self.pace.basis))

    @property
    def epochs(self) -> float | None:
        """Times that each training token is seen."""
        tokens = self.data.train_tokens
        return total_tokens(self.config) / tokens if tokens else None


@dataclass(frozen=True)
class Report:
    path: str
    target: TargetGPU
    figures: Figures | None
    """None where the config itself is wrong: then the problems say why."""
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...] = ()
    suggestions: tuple[Suggestion, ...] = field(default=())

    @property
    def blocked(self) -> bool:
        return bool(self.problems)

    def as_json(self) -> dict[str, Any]:
        """Plain values. What is not known is null, and so are the figures of a wrong config."""
        return {
            "config": self.path,
            "gpu": self.target.name,
            "blocked": self.blocked,
            **(_figures_json(self.figures, self.target) if self.figures else _NO_FIGURES),
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
    """The report on a config file. `starting`: a run begins now on this machine, so sources that
    are missing stop it; asked beforehand they are a warning. `network_gbit`: of each machine, where
    there are several; `ConfigError` for one of no speed. Never raises for a bad config."""
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
    """The report on values that came from `path`, overrides laid over."""
    try:
        config = build_config(raw)
    except ConfigError as error:
        warning = target.warning
        return Report(
            path,
            target,
            None,
            error.problems,
            (warning,) if warning else (),
            _suggestions_for(error.problems, raw, target.memory_bytes),
        )
    return _examined(path, target, starting, _figures(config, target, network_gbit))


def _examined(path: str, target: TargetGPU, starting: bool, figures: Figures) -> Report:
    config = figures.config
    suggestions: list[Suggestion] = []
    if figures.fits is False and target.memory_bytes is not None:
        key = "training.batch_size" if figures.layout.devices == 1 else "hardware.sharding"
        suggestions += smaller(key, config, target.memory_bytes)
    ways = tuple(suggestion.as_overrides() for suggestion in suggestions)
    facts = CheckContext(config, target, figures.data, figures.memory, starting, ways)
    problems = tuple(found for check in PROBLEMS if (found := check(facts)))
    warnings = tuple(found for check in WARNINGS if (found := check(facts)))
    if any(warning.key == "model.n_head" for warning in warnings):
        suggestions += suggest_aligned_heads("model.n_head", config, target.memory_bytes)
    return Report(path, target, figures, problems, warnings, tuple(suggestions))


def _figures(config: RunConfig, target: TargetGPU, network_gbit: float) -> Figures:
    layout = choose_layout(config, target.memory_bytes)
    memory, data = estimate_memory(config, layout), estimate_data(config)
    pace = estimate_throughput(config, target.card, find_measured_throughput(config, target.card))
    on_cpu = config.hardware.device == "cpu"
    if on_cpu:
        pace = Throughput(None, "n/a: on a CPU")
    facts = CheckContext(config, target, data, memory, starting=False)
    return Figures(
        config=config,
        parameters=count_parameters(config.model),
        memory=memory,
        fits=None if on_cpu else fits(config, target.memory_bytes),
        pace=pace,
        data=data,
        disk=disk_needed(facts),
        free_disk_bytes=free_disk_bytes(config),
        layout=layout,
        scaling=estimate_scaling(config, layout, target.card, pace.tokens_per_second, network_gbit),
    )


def _suggestions_for(
    problems: Sequence[Problem], raw: Mapping[str, Any], memory_bytes: int | None
) -> tuple[Suggestion, ...]:
    """Choices of heads, where those are what is wrong."""
    for problem in problems:
        if "must be divisible" in problem.rule or "channels in pairs" in problem.rule:
            return tuple(suggest_head_splits(problem.key, raw, memory_bytes))
    return ()


# --- as JSON -------------------------------------------------------------------------------------


def _figures_json(figures: Figures, target: TargetGPU) -> dict[str, Any]:
    config, memory = figures.config, figures.memory
    return {
        "parameters": {
            "total": figures.parameters.total,
            "tied": figures.parameters.tied,
            **figures.parameters.groups(),
        },
        "memory": {
            "peak_bytes": memory.peak_bytes,
            "parts": dict(memory.parts),
            "moment": memory.moment,
            "compiled_bytes": memory.compiled_bytes,
            "overheads": dict(memory.overheads),
            "evaluation_bytes": memory.evaluation_bytes,
            "needed_bytes": memory.needed_bytes,
            "loss_chunk_rows": memory.chunk_rows,
            "card_bytes": target.memory_bytes,
            "fits": figures.fits,
        },
        "tokens_per_step": config.tokens_per_step,
        "steps": config.training.max_steps,
        "tokens": total_tokens(config),
        "flops_per_token": flops_per_token(config),
        "tokens_per_second": figures.tokens_per_second,
        "hours": figures.hours,
        "basis": figures.pace.basis,
        "data": {
            "train_tokens": figures.data.train_tokens,
            "validation_tokens": figures.data.validation_tokens,
            "epochs": figures.epochs,
            "basis": figures.data.basis,
        },
        "disk": {**figures.disk, "free": figures.free_disk_bytes},
        **_scaling_json(figures),
    }


def _scaling_json(figures: Figures) -> dict[str, Any]:
    """Nothing with one device."""
    if figures.layout.devices == 1:
        return {}
    scaling, steps = figures.scaling, figures.config.training.max_steps
    return {"scaling": scaling.as_json(steps) if scaling else None}


_NO_FIGURES: dict[str, Any] = dict.fromkeys(
    (
        "parameters",
        "memory",
        "tokens_per_step",
        "steps",
        "tokens",
        "flops_per_token",
        "tokens_per_second",
        "hours",
        "basis",
        "data",
        "disk",
    )
)
