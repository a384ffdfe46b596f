"""Who takes part in a comparison: configs and seeds, made comparable. Without Prefect and torch, so
that what cannot be compared is told in a second."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config.loading import load_config, merge_overrides
from gpt.config.schema import DataSection, RunConfig, fingerprint
from gpt.errors import ConfigError, Problem
from gpt.training.identity import run_identity

ANYWHERE = ("engine", "workers", "runner", "cluster", "store")
"""Keys of [data] that say how and where it is tokenised: the tokens are the same."""
SHARED = (
    "run.root",
    *(f"data.{key}" for key in DataSection.model_fields if key not in ANYWHERE),
    *("evaluation.tokens", "evaluation.hellaswag", "evaluation.lambada"),
    *("evaluation.benchmark_examples", "tracking.experiment", "tracking.uri"),
)
"""What must be equal for the numbers to be about one thing."""


@dataclass(frozen=True)
class Variant:
    """One config with one seed."""

    name: str
    """The config's, for all its seeds."""
    path: str
    overrides: dict[str, Any]
    """All that was laid over the file, the run's own name, seed and length included."""
    config: RunConfig | None
    """None where the config cannot work."""
    failure: str = ""

    @property
    def seed(self) -> int:
        return self.config.training.seed if self.config else 0


def expand_variants(
    paths: Sequence[str], overrides: Mapping[str, Any], tokens: int | None, seeds: int
) -> list[Variant]:
    """Every config with every seed, the first seeds of all configs first, so that a comparison
    that is broken off has seen each config.

    Raises `ConfigError` where the configs are not about the same data and evaluation, or where none
    of them can work; one that cannot work beside others that can is an entrant with a failure.
    """
    if len(paths) < 2:
        rule = "there is nothing to compare it with"
        raise ConfigError(Problem("CONFIG", " ".join(paths), rule, "give two configs or more"))
    if seeds < 1 or (tokens is not None and tokens < 1):
        key, value = ("--seeds", seeds) if seeds < 1 else ("--tokens", tokens)
        raise ConfigError(Problem(key, str(value), "must be 1 or more", "give a larger number"))
    configs: dict[str, RunConfig | ConfigError] = {}
    for path in paths:
        try:
            configs[path] = load_config(path, overrides)
        except ConfigError as error:
            configs[path] = error
    sound = {path: found for path, found in configs.items() if isinstance(found, RunConfig)}
    if not sound:
        failures = [found for found in configs.values() if isinstance(found, ConfigError)]
        # What was laid over all of them is told once.
        raise ConfigError(*dict.fromkeys(p for failure in failures for p in failure.problems))
    _refuse_unlike(sound)
    names = _names(paths, sound)
    return [
        _entrant(names[path], path, overrides, found, tokens, number)
        for number in range(seeds)
        for path, found in configs.items()
        if number == 0 or isinstance(found, RunConfig)
    ]


def _refuse_unlike(configs: Mapping[str, RunConfig]) -> None:
    first, *others = configs.items()
    ours = first[1].flatten()
    problems = []
    for path, config in others:
        theirs = config.flatten()
        problems += [
            Problem(
                key,
                str(theirs[key]),
                f"{path} differs in it from {first[0]}, which has {ours[key]}; models are compared "
                "on one data set and one evaluation",
                f"lay one value over all of them: --set {key}=...",
            )
            for key in SHARED
            if theirs[key] != ours[key]
        ]
    if problems:
        raise ConfigError(*problems)


def _names(paths: Sequence[str], configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """Each config's own where those differ, else by their files."""
    for name_of in (
        lambda path: configs[path].run.name if path in configs else Path(path).stem,
        lambda path: _as_name(Path(path).stem),
        lambda path: _as_name(str(Path(path).with_suffix(""))),
    ):
        names = {path: name_of(path) for path in paths}
        if len(set(names.values())) == len(names):
            return names
    counts: Counter[str] = Counter()
    for path, name in names.items():
        counts[name] += 1
        names[path] = f"{name}-{counts[name]}"
    return names


def _as_name(text: str) -> str:
    return re.sub("[^A-Za-z0-9._-]+", "-", text).strip("-._") or "config"


def _entrant(
    name: str,
    path: str,
    overrides: Mapping[str, Any],
    found: RunConfig | ConfigError,
    tokens: int | None,
    number: int,
) -> Variant:
    if isinstance(found, ConfigError):
        return Variant(name, path, dict(overrides), None, str(found))
    own: dict[str, Any] = {"run": {"name": name}}
    if number:  # the first has the name and the seed of the config alone, as a run by itself
        seed = found.training.seed + number
        own = {"run": {"name": f"{name}-seed{seed}"}, "training": {"seed": seed}}
    laid_over = merge_overrides(
        merge_overrides(overrides, own), _length(found, tokens) if tokens else {}
    )
    try:
        return Variant(name, path, laid_over, load_config(path, laid_over))
    except ConfigError as error:  # as a schedule that such a length has no room for
        return Variant(name, path, laid_over, None, str(error))


def _length(config: RunConfig, tokens: int) -> dict[str, Any]:
    """So many tokens; where that is shorter than the config's own length, with the schedule's
    warm-up as much shorter (its cool-down is a share of the steps already)."""
    steps, own = math.ceil(tokens / config.tokens_per_step), config.training.max_steps
    warmup = config.schedule.warmup_steps
    shorter = {"schedule": {"warmup_steps": round(warmup * steps / own)}} if steps < own else {}
    return {"training": {"max_steps": steps}, **shorter}


def comparison_folder(root: Path, variants: Sequence[Variant], name: str) -> Path:
    """`<root>/compare/<name>-<8 hex>`: the same entrants come back to the same folder."""
    values = {
        f"{number}": run_identity(each.config, "") + str(each.config.training.max_steps)
        for number, each in enumerate(variants)
        if each.config
    }
    names = dict.fromkeys(variant.name for variant in variants)
    folder = root / "compare" / f"{name or '-vs-'.join(names)[:80]}-{fingerprint(values)[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
