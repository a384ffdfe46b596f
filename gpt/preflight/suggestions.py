"""Suggested changes: settings near the wanted ones that work, each checked by computation.

A suggestion is a set of overrides. Applied to the config it was made for, it removes the problem; a
property test checks that it does.
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
from gpt.preflight.memory import estimate_memory
from gpt.preflight.parameters import count_parameters
from gpt.preflight.sharding import fits_memory

MIN_CHUNK_ROWS = 256
MAX_BATCH_SIZE = 1_024
"""Largest batch size that is tried: no GPU holds more sequences of a useful length."""


@dataclass(frozen=True)
class Suggestion:
    """Overrides that remove a problem, and what they result in."""

    key: str
    """Config key of the problem or warning."""
    overrides: Mapping[str, Any]
    """Dotted keys and their new values."""
    n_embd: int
    n_head: int
    parameters: int | None
    """None if other values of the model are invalid."""
    fits: bool | None
    """Whether the GPU's memory suffices; None without a GPU, or if other values are invalid."""

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    def as_overrides(self) -> str:
        """As they are written after --set."""
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
    """Return `raw` with overrides given by dotted keys."""
    result = dict(raw)
    for key, value in overrides.items():
        section, name = key.split(".")
        result = merge_overrides(result, {section: {name: value}})
    return result


# --- heads ---------------------------------------------------------------------------------------


def suggest_head_splits(
    key: str, raw: Mapping[str, Any], memory_bytes: int | None
) -> list[Suggestion]:
    """Splits for a width that its heads do not divide, the nearest in parameters first."""
    model = raw["model"]
    even = model.get("architecture") == "nanochat"
    splits = valid_head_splits(model["n_embd"], model["n_head"], even)
    return _rank(key, raw, splits, memory_bytes)


def suggest_aligned_heads(
    key: str, config: RunConfig, memory_bytes: int | None
) -> list[Suggestion]:
    """Splits with heads of a multiple of 8 channels, the nearest in parameters first."""
    n_embd, n_head = config.model.n_embd, config.model.n_head
    size = n_embd // n_head // 8 * 8
    same_heads = [(n_head * near, n_head) for near in (size, size + 8) if near > 0]
    splits = [*valid_head_splits(n_embd, n_head), *same_heads]
    aligned = [split for split in splits if split[0] // split[1] % 8 == 0]
    return _rank(key, config.model_dump(mode="json"), aligned, memory_bytes)


def _rank(
    key: str,
    raw: Mapping[str, Any],
    splits: Iterable[tuple[int, int]],
    memory_bytes: int | None,
) -> list[Suggestion]:
    model = raw["model"]
    wanted = _count_parameters(model, model["n_embd"], model["n_head"])
    found = []
    for n_embd, n_head in dict.fromkeys(splits):
        if (n_embd, n_head) == (model["n_embd"], model["n_head"]):
            continue
        overrides = {"model.n_embd": n_embd, "model.n_head": n_head}
        parameters = _count_parameters(model, n_embd, n_head)
        try:
            fits = fits_memory(build_config(apply_overrides(raw, overrides)), memory_bytes)
        except ConfigError:
            fits = None
        found.append(Suggestion(key, overrides, n_embd, n_head, parameters, fits))

    def distance(choice: Suggestion) -> tuple[int, int]:
        difference = (choice.parameters or choice.n_embd) - (wanted or model["n_embd"])
        return abs(difference), abs(choice.n_head - model["n_head"])

    return sorted(found, key=distance)


def _count_parameters(model: Mapping[str, Any], n_embd: int, n_head: int) -> int | None:
    try:
        section = ModelSection(**{**model, "n_embd": n_embd, "n_head": n_head})
    except ValidationError:
        return None
    return count_parameters(section).total


# --- memory --------------------------------------------------------------------------------------


def suggest_memory_savings(key: str, config: RunConfig, memory_bytes: int) -> list[Suggestion]:
    """Suggest changes that make a run fit, the cheapest first: the largest micro-batch that fits,
    with tokens per step unchanged; smaller evaluation batches; fewer logits at once; activation
    checkpointing.

    A change that does not suffice alone is combined with those before it. Returns an empty list if
    nothing suffices.
    """
    found = []
    before: dict[str, Any] = {}
    for candidates in (_batch_sizes, _evaluation_batch_sizes, _chunk_rows, _checkpointing):
        for base in ({}, before) if before else ({},):
            changed = _with(config, base)
            fitting = (
                c for c in candidates(changed) if fits_memory(_with(changed, c), memory_bytes)
            )
            if (largest := next(fitting, None)) is not None:
                found.append(_suggestion(key, config, {**base, **largest}))
                break
        else:
            for smallest in candidates(config)[-1:]:
                before = {**before, **smallest}
    return found


def _with(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the config with values that are known to be valid."""
    for key, value in overrides.items():
        section, name = key.split(".")
        changed = getattr(config, section).model_copy(update={name: value})
        config = config.model_copy(update={section: changed})
    return config


def _suggestion(key: str, config: RunConfig, overrides: Mapping[str, Any]) -> Suggestion:
    model = config.model
    total = count_parameters(model).total
    return Suggestion(key, overrides, model.n_embd, model.n_head, total, True)


# Each of these lists candidates from the largest to the smallest.


def _batch_sizes(config: RunConfig) -> list[dict[str, Any]]:
    sequences = config.sequences_per_step
    return [
        {"training.batch_size": size, "training.grad_acc": sequences // size}
        for size in range(min(config.training.batch_size - 1, MAX_BATCH_SIZE), 0, -1)
        if sequences % (size * config.hardware.world_size) == 0
    ]


def _evaluation_batch_sizes(config: RunConfig) -> list[dict[str, Any]]:
    largest = min(config.evaluation.batch_size - 1, MAX_BATCH_SIZE)
    return [{"evaluation.batch_size": size} for size in range(largest, 0, -1)]


def _chunk_rows(config: RunConfig) -> list[dict[str, Any]]:
    rows = estimate_memory(config).loss_chunk_rows
    halves = [rows >> shift for shift in range(1, rows.bit_length())]
    return [{"training.loss_chunk_rows": half} for half in halves if half >= MIN_CHUNK_ROWS]


def _checkpointing(config: RunConfig) -> list[dict[str, Any]]:
    if config.training.activation_checkpointing:
        return []
    return [{"training.activation_checkpointing": True}]
