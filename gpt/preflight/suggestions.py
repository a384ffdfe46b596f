"""What to change: settings near the wanted ones that work, found by search and computed through.

A suggestion is a set of overrides. Laid over the config it was made for, it makes its problem go
away; a property test holds it to that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from gpt.config.loading import build_config, merge_overrides
from gpt.config.rules import valid_head_splits
from gpt.config.schema import ModelSection, RunConfig
from gpt.errors import ConfigError
from gpt.preflight.layout import devices_of, layouts_of
from gpt.preflight.memory import estimate_memory
from gpt.preflight.parameters import count_parameters

SMALL_CHUNK_ROWS = 256
LARGEST_BATCH = 1_024
"""Most sequences at once that are tried: no card holds more of a context worth training."""


@dataclass(frozen=True)
class Suggestion:
    """Overrides that help, and what they come to."""

    key: str
    """Of the problem or warning that it is for."""
    overrides: Mapping[str, Any]
    """Dotted keys and their new values."""
    n_embd: int
    n_head: int
    parameters: int | None
    """None: other values of the model are wrong, so nobody knows."""
    fits: bool | None
    """Whether the card holds it; None: no card, or other values are wrong."""

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    def as_overrides(self) -> str:
        """As they stand after --set."""
        return " ".join(f"{key}={json.dumps(value)}" for key, value in self.overrides.items())

    def as_json(self) -> dict[str, Any]:
        return {
            "for": self.key,
            "set": dict(self.overrides),
            "n_embd": self.n_embd,
            "n_head": self.n_head,
            "head_size": self.head_size,
            "parameters": self.parameters,
            "fits": self.fits,
        }


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with dotted overrides."""
    result = dict(raw)
    for key, value in overrides.items():
        section, name = key.split(".")
        result = merge_overrides(result, {section: {name: value}})
    return result


def fits(config: RunConfig, memory_bytes: int | None) -> bool | None:
    """Whether a card of that memory holds a run, or its part of one on many devices; None where
    there is no card."""
    if memory_bytes is None:
        return None
    return any(
        estimate_memory(config, layout).needed_bytes <= memory_bytes
        for layout in layouts_of(config)
    )


# --- heads ---------------------------------------------------------------------------------------


def suggest_head_splits(
    key: str, raw: Mapping[str, Any], memory_bytes: int | None
) -> list[Suggestion]:
    """Choices where heads do not divide the width, the nearest in parameters first."""
    model = raw["model"]
    even = model.get("architecture") == "nanochat"
    pairs = valid_head_splits(model["n_embd"], model["n_head"], even)
    return _ranked(key, raw, pairs, memory_bytes)


def suggest_aligned_heads(
    key: str, config: RunConfig, memory_bytes: int | None
) -> list[Suggestion]:
    """Choices whose heads are multiples of 8 channels, the nearest in parameters first."""
    model = config.model
    pairs = [
        pair
        for pair in (
            *valid_head_splits(model.n_embd, model.n_head),
            *((model.n_head * size, model.n_head) for size in _sizes_around(config)),
        )
        if pair[0] // pair[1] % 8 == 0
    ]
    return _ranked(key, config.model_dump(mode="json"), pairs, memory_bytes)


def _sizes_around(config: RunConfig) -> tuple[int, ...]:
    size = config.model.n_embd // config.model.n_head
    below = size // 8 * 8
    return tuple(s for s in (below, below + 8) if s > 0)


def _ranked(
    key: str,
    raw: Mapping[str, Any],
    pairs: Iterable[tuple[int, int]],
    memory_bytes: int | None,
) -> list[Suggestion]:
    model = raw["model"]
    wanted = _parameters_like(model, model["n_embd"], model["n_head"])
    found = []
    for n_embd, n_head in dict.fromkeys(pairs):
        if (n_embd, n_head) == (model["n_embd"], model["n_head"]):
            continue
        overrides = {"model.n_embd": n_embd, "model.n_head": n_head}
        parameters = _parameters_like(model, n_embd, n_head)
        fitting = _fits_with(raw, overrides, memory_bytes)
        found.append(Suggestion(key, overrides, n_embd, n_head, parameters, fitting))

    def distance(choice: Suggestion) -> tuple[int, int]:
        off = abs((choice.parameters or choice.n_embd) - (wanted or model["n_embd"]))
        return off, abs(choice.n_head - model["n_head"])

    return sorted(found, key=distance)


def _parameters_like(model: Mapping[str, Any], n_embd: int, n_head: int) -> int | None:
    try:
        section = ModelSection(**{**model, "n_embd": n_embd, "n_head": n_head})
    except ValidationError:
        return None
    return count_parameters(section).total


def _fits_with(
    raw: Mapping[str, Any], overrides: Mapping[str, Any], memory_bytes: int | None
) -> bool | None:
    if memory_bytes is None:
        return None
    try:
        return fits(build_config(apply_overrides(raw, overrides)), memory_bytes)
    except ConfigError:
        return None


# --- memory --------------------------------------------------------------------------------------


def smaller(key: str, config: RunConfig, memory_bytes: int) -> list[Suggestion]:
    """Ways to make a run fit, the cheapest first: the largest micro-batch that does, with the
    accumulation that keeps tokens a step; smaller evaluation batches; fewer rows of logits at
    once; activation checkpointing.

    A way that is not enough alone is tried on top of those before it. Empty: nothing is enough.
    """
    found = []
    before: dict[str, Any] = {}
    for way in (_batches, _evaluation_batches, _chunks, _checkpointing):
        for base in ({}, before) if before else ({},):
            changed = _first_fitting(_with(config, base), way(_with(config, base)), memory_bytes)
            if changed:
                found.append(_suggestion(key, config, {**base, **changed}))
                break
        else:
            smallest = way(config)[-1:]
            before = {**before, **(smallest[0] if smallest else {})}
    return found


def _first_fitting(
    config: RunConfig, ways: Iterable[dict[str, Any]], memory_bytes: int
) -> dict[str, Any] | None:
    """`ways` come from the largest to the smallest, so the first that fits is the best."""
    return next((way for way in ways if fits(_with(config, way), memory_bytes)), None)


def _with(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """The config with values that are known to be right."""
    for key, value in overrides.items():
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


def _suggestion(key: str, config: RunConfig, overrides: Mapping[str, Any]) -> Suggestion:
    model = config.model
    total = count_parameters(model).total
    return Suggestion(key, overrides, model.n_embd, model.n_head, total, True)


def _batches(config: RunConfig) -> list[dict[str, Any]]:
    sequences = config.sequences_per_step
    return [
        {"training.batch_size": size, "training.grad_acc": sequences // size}
        for size in range(min(config.training.batch_size - 1, LARGEST_BATCH), 0, -1)
        if sequences % (size * devices_of(config)) == 0
    ]


def _evaluation_batches(config: RunConfig) -> list[dict[str, Any]]:
    largest = min(config.evaluation.batch_size - 1, LARGEST_BATCH)
    return [{"evaluation.batch_size": size} for size in range(largest, 0, -1)]


def _chunks(config: RunConfig) -> list[dict[str, Any]]:
    rows = estimate_memory(config).chunk_rows
    halves = [rows >> shift for shift in range(1, rows.bit_length())]
    return [{"training.loss_chunk_rows": half} for half in halves if half >= SMALL_CHUNK_ROWS]


def _checkpointing(config: RunConfig) -> list[dict[str, Any]]:
    if config.training.activation_checkpointing:
        return []
    return [{"training.activation_checkpointing": True}]
