"""How fast a card trained before: what runs below `run.root` have left in their folders."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.config.schema import RunConfig
from gpt.hardware.flops import flops_per_token
from gpt.hardware.gpus import GPUSpec, find_gpu
from gpt.preflight.data_estimate import newest_first
from gpt.preflight.time import Throughput

MOST_RUNS = 20
LAST_STEPS = 200
"""Steps whose median counts: the first ones compile and warm up."""


def find_measured_throughput(config: RunConfig, card: GPUSpec | None) -> Throughput | None:
    """The pace of `config` on `card` from the newest run there of the same dtype, by operations a
    second: a model of another size is slower or faster as its operations are more or fewer."""
    if card is None:
        return None
    for folder in _newest_runs(config.run.root / "train"):
        found = _measured(folder, card, config)
        if found:
            return found
    return None


def _newest_runs(parent: Path) -> list[Path]:
    return [path.parent for path in newest_first(parent, "*/metrics.jsonl")][:MOST_RUNS]


def _measured(folder: Path, card: GPUSpec, config: RunConfig) -> Throughput | None:
    try:
        outbox = json.loads((folder / "tracking_outbox.json").read_bytes())
        record = json.loads((folder / "run.json").read_bytes())
        then = RunConfig.model_validate_json(json.dumps(record["config"]))
        device = str(outbox["parameters"]["device"]).removeprefix("cuda: ")
        paces = list(_paces(folder / "metrics.jsonl"))[-LAST_STEPS:]
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None
    ran_on = find_gpu(device)
    same = ran_on and ran_on.name == card.name and then.training.dtype == config.training.dtype
    if not same or not paces:
        return None
    pace = statistics.median(paces) * flops_per_token(then) / flops_per_token(config)
    return Throughput(pace, f"measured on this card before, by {folder.name}")


def _paces(journal: Path) -> Iterator[float]:
    for line in journal.read_text(encoding="utf-8").splitlines():
        metrics: Any = json.loads(line)["metrics"]
        if "tokens_per_second" in metrics:
            yield float(metrics["tokens_per_second"])
