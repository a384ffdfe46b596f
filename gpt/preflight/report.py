"""The report of a preflight: what a run will need, whether it can work, and what to change.

It is computed from the config, the table of GPUs and the sizes of files; nothing is read, started
or run on a GPU. `Report` holds plain values; `gpt.preflight.render` shows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt.config.loading import build_config, merge_overrides, read_toml
from gpt.config.rules import HEAD_SPLIT_REMEDY
from gpt.errors import ConfigError, Problem
from gpt.hardware.interconnect import DEFAULT_NETWORK_GBIT
from gpt.hardware.target_gpu import TargetGPU, find_target_gpu
from gpt.preflight.checks import find_problems
from gpt.preflight.figures import Figures, compute_figures
from gpt.preflight.suggestions import Suggestion, suggest_heads
from gpt.preflight.warnings import find_warnings


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
            **(_figures_json(self.figures) if self.figures else _NO_FIGURES),
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
        heads = [
            suggestion
            for problem in error.problems
            if problem.remedy.startswith(HEAD_SPLIT_REMEDY)
            for suggestion in suggest_heads(problem.key, raw, target, aligned=False)
        ]
        return Report(path, target, None, error.problems, unknown_gpu, tuple(heads))
    figures = compute_figures(config, target, starting, network_gbit)
    problems, warnings = tuple(find_problems(figures)), tuple(find_warnings(figures))
    suggestions = figures.memory_savings
    if any(warning.key == "model.n_head" for warning in warnings):
        values = config.model_dump(mode="json")
        heads = suggest_heads("model.n_head", values, target, aligned=True)
        suggestions = [*suggestions, *heads]
    return Report(path, target, figures, problems, warnings, tuple(suggestions))


def _figures_json(figures: Figures) -> dict[str, Any]:
    config, memory, scaling = figures.config, figures.memory, figures.scaling
    values = {
        "parameters": {"total": figures.parameters.total, **asdict(figures.parameters)},
        "memory": {
            "peak_bytes": memory.peak_bytes,
            "needed_bytes": memory.needed_bytes,
            **asdict(memory),
            "card_bytes": figures.gpu.memory_bytes,
            "fits": figures.fits,
        },
        "tokens_per_step": config.tokens_per_step,
        "steps": config.training.max_steps,
        "tokens": config.total_tokens,
        "flops_per_token": config.flops_per_token,
        "tokens_per_second": figures.tokens_per_second,
        "hours": figures.hours,
        "hours_range": figures.hours_range,
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
        *("tokens_per_second", "hours", "hours_range", "basis", "data", "disk"),
    )
)
