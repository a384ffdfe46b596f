"""Suggested changes: settings near the wanted ones that work, each checked by computation.

A suggestion is a set of overrides. Applied to the config it was made for, it removes the problem; a
property test checks that it does.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from gpt.config.loading import build_config, merge_overrides
from gpt.config.rules import valid_head_splits
from gpt.config.schema import ModelSection, RunConfig
from gpt.errors import ConfigError
from gpt.hardware.target_gpu import TargetGPU
from gpt.preflight.memory import estimate_memory, fits_memory
from gpt.preflight.parameters import count_parameters

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
        values = {**asdict(self), "head_size": self.head_size}
        return {"for": values.pop("key"), "set": values.pop("overrides"), **values}


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `raw` with overrides given by dotted keys."""
    result = dict(raw)
    for key, value in overrides.items():
        section, name = key.split(".")
        result = merge_overrides(result, {section: {name: value}})
    return result


def suggest_heads(
    key: str, raw: Mapping[str, Any], gpu: TargetGPU, aligned: bool
) -> list[Suggestion]:
    """Suggest splits of the width into heads, the nearest in parameters first: for a width that the
    heads do not divide, or with `aligned` for heads that are no multiple of 8 channels."""
    model = raw["model"]
    width, heads = model["n_embd"], model["n_head"]
    splits = valid_head_splits(width, heads, even=model.get("architecture") == "nanochat")
    if aligned:
        size = width // heads // 8 * 8
        splits += [(heads * near, heads) for near in (size, size + 8)]
        splits = [split for split in splits if split[0] and split[0] // split[1] % 8 == 0]
    wanted = _count_parameters(model) or width
    found = []
    for n_embd, n_head in dict.fromkeys(splits):
        overrides = {"model.n_embd": n_embd, "model.n_head": n_head}
        changed = apply_overrides(raw, overrides)
        try:
            fits = fits_memory(build_config(changed), gpu)
        except ConfigError:
            fits = None
        parameters = _count_parameters(changed["model"])
        found.append(Suggestion(key, overrides, n_embd, n_head, parameters, fits))

    def distance(choice: Suggestion) -> tuple[int, int]:
        difference = (choice.parameters or choice.n_embd) - wanted
        return abs(difference), abs(choice.n_head - heads)

    return sorted(found, key=distance)


def _count_parameters(model: Mapping[str, Any]) -> int | None:
    try:
        return count_parameters(ModelSection(**model)).total
    except ValidationError:
        return None


def suggest_memory_savings(config: RunConfig, gpu: TargetGPU) -> list[Suggestion]:
    """Suggest changes that make a run fit, the cheapest first: the largest micro-batch that fits,
    with tokens per step unchanged; smaller evaluation batches; fewer logits at once; activation
    checkpointing.

    A change that does not suffice alone is combined with those before it. Returns an empty list if
    nothing suffices.
    """
    values, model = config.model_dump(), config.model
    total = count_parameters(model).total
    key = "training.batch_size" if config.hardware.world_size == 1 else "hardware.sharding"
    found = []
    before: dict[str, Any] = {}
    for candidates in _memory_savings(config):
        for overrides in [*candidates, *(before | candidate for candidate in candidates)]:
            changed = RunConfig.model_validate(apply_overrides(values, overrides))
            if fits_memory(changed, gpu):
                found.append(Suggestion(key, overrides, model.n_embd, model.n_head, total, True))
                break
        else:
            before |= candidates[-1] if candidates else {}
    return found


def _memory_savings(config: RunConfig) -> Iterator[list[dict[str, Any]]]:
    """Yield the candidates of each kind of change, from the largest to the smallest."""
    training, sequences = config.training, config.sequences_per_step
    yield [
        {"training.batch_size": size, "training.grad_acc": sequences // size}
        for size in range(min(training.batch_size - 1, MAX_BATCH_SIZE), 0, -1)
        if sequences % (size * config.hardware.world_size) == 0
    ]
    largest = min(config.evaluation.batch_size - 1, MAX_BATCH_SIZE)
    yield [{"evaluation.batch_size": size} for size in range(largest, 0, -1)]
    rows = estimate_memory(config).loss_chunk_rows
    halves = [rows >> shift for shift in range(1, rows.bit_length())]
    yield [{"training.loss_chunk_rows": half} for half in halves if half >= MIN_CHUNK_ROWS]
    if not training.activation_checkpointing:
        yield [{"training.activation_checkpointing": True}]
