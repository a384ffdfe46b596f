"""How fast a GPU trains, how long a run takes, and what it writes to disk."""

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import exp, log, sqrt
from pathlib import Path

from gpt.config.schema import RunConfig
from gpt.hardware.calibration import read_calibration
from gpt.hardware.gpus import GPUS, GPUSpec, find_gpu, read_rows
from gpt.hardware.target_gpu import installed_gpus
from gpt.preflight.data_estimate import DataEstimate, newest_first
from gpt.preflight.parameters import count_parameters
from gpt.preflight.throughput import (
    Shape,
    describe_shape,
    load_efficiency,
    step_seconds,
)

RUNS_SEARCHED = 20
LAST_STEPS = 200
"""Steps over which the median is taken: the first ones compile and warm up."""
RUN_ERROR = 0.04
"""Relative difference between two runs on one GPU (temperature, driver, other load); assumed."""
STEP_ERROR = 0.3
"""The same between single steps, so that a run of a few steps counts little; assumed."""


@dataclass(frozen=True)
class Throughput:
    """Training throughput of one GPU; None if it cannot be estimated."""

    tokens_per_second: float | None
    basis: str
    """Where the number comes from."""
    slowest: float = 0.0
    fastest: float = 0.0
    """Bounds of the throughput by the error of the estimate."""


@dataclass(frozen=True)
class MeasuredPace:
    """Steps that were measured on the user's own GPU."""

    shape: Shape
    tokens_per_second: float
    steps: int
    source: str
    step_error: float = STEP_ERROR


def estimate_throughput(config: RunConfig, gpu: GPUSpec | None) -> Throughput:
    """Estimate throughput from published measurements, corrected by the calibration of this GPU and
    earlier runs on it below `run.root` with the same dtype."""
    if config.hardware.device == "cpu":
        return Throughput(None, "n/a: on a CPU")
    if gpu is None:
        return Throughput(None, "n/a: no GPU, or one that is not in the table")
    return correct_throughput(
        config, gpu, [*_calibrated_paces(config, gpu), *_find_paces(config, gpu)]
    )


def nominal_throughput(config: RunConfig, gpu: GPUSpec) -> Throughput:
    """Estimate throughput from published measurements; the same on every machine."""
    return correct_throughput(config, gpu, ())


def correct_throughput(
    config: RunConfig, gpu: GPUSpec, paces: Sequence[MeasuredPace]
) -> Throughput:
    """Weigh the model against what was measured on the user's own GPU.

    Each measurement gives a factor on the model's time. The more steps and measurements there are
    and the better they agree, the more their mean replaces the factor 1.
    """
    if gpu.peak_tflops(config.training.dtype) is None:
        return Throughput(None, f"n/a: {gpu.name} has no tensor cores for {config.training.dtype}")
    shape, dtype = describe_shape(config), config.training.dtype
    seconds, spread = _step_seconds(shape, gpu, dtype), log(1 + _model_error(gpu))
    # The card alone, a laptop's at its lowest power limit.
    low = gpu if gpu.low_tflops is None else replace(gpu, tflops=gpu.low_tflops)
    slowest = step_seconds(shape, low, low.peak_tflops(dtype) or 0.0, load_efficiency())
    factors = [
        log(_tokens(pace.shape) / pace.tokens_per_second / _step_seconds(pace.shape, gpu, dtype))
        for pace in paces
    ]
    between = max(RUN_ERROR, statistics.stdev(factors) if len(factors) > 1 else 0.0)
    weights = [1 / (between**2 + pace.step_error**2 / pace.steps) for pace in paces]
    precision = sum(weights) + 1 / spread**2
    shift = sum(w * factor for w, factor in zip(weights, factors, strict=True)) / precision
    error = max(sqrt(1 / precision), RUN_ERROR if paces else 0.0)
    # A laptop's lower power limit, or a better card that the model holds for slower, widens the
    # range, and no longer once the GPU was measured.
    widened = error + max(0.0, log(slowest / seconds)) / (spread**2 * precision)
    rate = _tokens(shape) / (seconds * exp(shift))
    if paces:
        names = list(dict.fromkeys(pace.source for pace in paces))
        names[3:] = ["..."] if names[3:] else []
        basis = f"measured on this card by {', '.join(names)}"
    else:
        basis = (
            f"fitted to published runs{'' if gpu.key in _measured_keys() else ' on other GPUs'} "
            f"(gpt/hardware/measurements.csv), {gpu.peak_tflops(dtype):g} TFLOP/s and "
            f"{gpu.bandwidth_gbs:g} GB/s"
        )
    basis += f"; error {exp(error) - 1:.0%}"
    return Throughput(rate, basis, rate * exp(-widened), rate * exp(error))


def _tokens(shape: Shape) -> int:
    return shape.grad_acc * shape.micro_batch_tokens


def _step_seconds(shape: Shape, gpu: GPUSpec, dtype: str) -> float:
    """Return the model's seconds of a step, so that no card is slower than one that is no better in
    peak, bandwidth and memory.

    The model alone would break that where generations differ. Cards yield to those with published
    runs; those before Ampere, which have no FlashAttention, are shown as fast as lesser newer ones.
    """

    def seconds(card: GPUSpec) -> float:
        return step_seconds(shape, card, card.peak_tflops(dtype) or 0.0, load_efficiency())

    return min(max(map(seconds, cards)) for cards in _comparisons(gpu, dtype))


def _is_better(one: GPUSpec, other: GPUSpec, dtype: str) -> bool:
    """Return whether a card is at least as good as another on paper."""
    return (
        (one.peak_tflops(dtype) or 0.0) >= (other.peak_tflops(dtype) or 0.0)
        and one.bandwidth_gbs >= other.bandwidth_gbs
        and one.memory_mib >= other.memory_mib
    )


@cache
def _comparisons(gpu: GPUSpec, dtype: str) -> tuple[tuple[GPUSpec, ...], ...]:
    """Return each card that is no better than `gpu`, followed by the cards with published runs that
    are no worse than it."""
    published = [card for card in GPUS if card.key in _measured_keys() and card.has_bfloat16]
    lesser = [gpu, *(c for c in GPUS if c.peak_tflops(dtype) and _is_better(gpu, c, dtype))]
    return tuple((card, *(p for p in published if _is_better(p, card, dtype))) for card in lesser)


@cache
def _measured_keys() -> frozenset[str]:
    return frozenset(row["gpu"] for row in read_rows("measurements.csv"))


def _model_error(gpu: GPUSpec) -> float:
    """Return the relative error of the model's time for a GPU with published runs; for one without;
    or twice that, if no GPU of its compute capability has any."""
    keys, efficiency = _measured_keys(), load_efficiency()
    if gpu.key in keys:
        return efficiency["run_error"]
    measured = {other.compute_capability for other in GPUS if other.key in keys}
    return efficiency["card_error"] * (1 if gpu.compute_capability in measured else 2)


def _calibrated_paces(config: RunConfig, gpu: GPUSpec) -> Iterator[MeasuredPace]:
    """Yield the steps that `overnight calibrate` measured with the installed driver."""
    for card in installed_gpus():
        if find_gpu(card.name, card.memory_bytes) != gpu:
            continue
        for measured in read_calibration(config.run.root, card):
            if measured.config and measured.config.training.dtype == config.training.dtype:
                shape, source = describe_shape(measured.config), "overnight calibrate"
                yield MeasuredPace(shape, measured.value, measured.steps, source, measured.spread)


def _find_paces(config: RunConfig, gpu: GPUSpec) -> Iterator[MeasuredPace]:
    """Yield the newest runs on this GPU with the same dtype."""
    for journal in newest_first(config.run.root / "train", "*/metrics.jsonl")[:RUNS_SEARCHED]:
        folder = journal.parent
        try:
            pending = json.loads((folder / "tracking_outbox.json").read_bytes())
            record = json.loads((folder / "run.json").read_bytes())
            earlier = RunConfig.model_validate_json(json.dumps(record["config"]))
            ran_on = find_gpu(str(pending["parameters"]["device"]).removeprefix("cuda: "))
            steps = map(json.loads, journal.read_text(encoding="utf-8").splitlines())
            rates = [float(r) for s in steps if (r := s["metrics"].get("tokens_per_second"))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        same_dtype = earlier.training.dtype == config.training.dtype
        if rates and same_dtype and ran_on and ran_on.name == gpu.name:
            rate = statistics.median(rates[-LAST_STEPS:]) / earlier.hardware.world_size
            yield MeasuredPace(describe_shape(earlier), rate, len(rates), folder.name)


def estimate_disk(config: RunConfig, data: DataEstimate) -> dict[str, int]:
    """Estimate the bytes that the run writes below `run.root`, by part. An existing dataset is not
    written again."""
    training, parameters = config.training, count_parameters(config.model)
    # Weights and optimizer states in float32.
    checkpoint = 4 * (parameters.total + parameters.optimizer_states(config.optimizer.name))
    every = training.checkpoint_keep_every
    permanent = training.max_steps // every if every else 0
    # The newest ones, the best, the one being written, and those that are never pruned.
    checkpoints = training.checkpoints_kept + 2 + permanent
    tokens = 0 if data.exact else (data.train_tokens or 0) + (data.validation_tokens or 0)
    return {
        "shards": 2 * tokens,
        "checkpoints": checkpoints * checkpoint,
        "model": 4 * parameters.total,
    }


def free_disk_bytes(root: Path) -> int | None:
    """Return the free space at a folder that need not exist yet; None if it is unknown."""
    try:
        return shutil.disk_usage(existing_ancestor(root)).free
    except (OSError, ValueError):
        return None


def existing_ancestor(path: Path) -> Path:
    """Return the path itself if it exists, otherwise the nearest folder above it that does."""
    absolute = path.expanduser().absolute()
    return next(p for p in (absolute, *absolute.parents) if p.exists())
