"""How fast a GPU trains, how long a run takes, and what it writes to disk."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

from gpt.config.schema import RunConfig
from gpt.hardware.gpus import GPUSpec, find_gpu
from gpt.preflight.data_estimate import DataEstimate, newest_first
from gpt.preflight.parameters import count_parameters

GEFORCE_UTILIZATION = 0.55
SERVER_UTILIZATION = 0.40
"""Assumed share of the peak FLOPs without a measurement. GeForce GPUs halve the rate of their
tensor cores for float32 sums, so memory bandwidth limits them less."""
UNCOMPILED_SHARE = 0.54
"""Throughput without compilation, as a share: nanoGPT's readme has 135 ms per iteration with and
250 ms without."""
NARROW_N_EMBD = 448
"""Below this width kernel launches take a share of the time that was not measured."""
MEASURED_UTILIZATION = {
    "rtx-4070": (0.82, "nanoGPT 124M at 56,000 tokens/s, a user's log"),
    "rtx-4090": (0.55, "nanoGPT 124M at 106,000 tokens/s, nanoGPT PR 225"),
    "h200": (0.42, "modded-nanogpt track 3 at 490,000 tokens/s"),
}
"""Published runs by GPU: tokens per second x `flops_per_token` / peak, and the source."""
RUNS_SEARCHED = 20
LAST_STEPS = 200
"""Steps over which the median is taken: the first ones compile and warm up."""


@dataclass(frozen=True)
class Throughput:
    """Training throughput of one GPU; None if the GPU is unknown."""

    tokens_per_second: float | None
    basis: str
    """Where the number comes from."""


def estimate_throughput(config: RunConfig, gpu: GPUSpec | None) -> Throughput:
    """Estimate throughput from an earlier run on this GPU below `run.root`; without one, from the
    peak and a utilization that was published for the GPU or is assumed."""
    if config.hardware.device == "cpu":
        return Throughput(None, "n/a: on a CPU")
    if gpu is None:
        return Throughput(None, "n/a: no GPU, or one that is not in the table")
    return _measured_throughput(config, gpu) or nominal_throughput(config, gpu)


def nominal_throughput(config: RunConfig, gpu: GPUSpec) -> Throughput:
    """Estimate throughput from the peak FLOPs alone; the same on every machine."""
    peak = gpu.peak_tflops(config.training.dtype)
    if peak is None:
        return Throughput(None, f"n/a: {gpu.name} has no tensor cores for {config.training.dtype}")
    if gpu.key in MEASURED_UTILIZATION:
        share, source = MEASURED_UTILIZATION[gpu.key]
        basis = f"{share:.0%} of {peak:g} TFLOP/s, as measured for {source}"
    else:
        share = GEFORCE_UTILIZATION if "GeForce" in gpu.name else SERVER_UTILIZATION
        basis = f"{share:.0%} of {peak:g} TFLOP/s, assumed: there is no measurement for this GPU"
    if config.model.n_embd < NARROW_N_EMBD:
        basis += "; narrow models reach less"
    if not config.training.compile:
        share, basis = share * UNCOMPILED_SHARE, f"{basis}; x {UNCOMPILED_SHARE} without compiling"
    return Throughput(share * peak * 1e12 / config.flops_per_token, basis)


def _measured_throughput(config: RunConfig, gpu: GPUSpec) -> Throughput | None:
    """Throughput by the newest run on this GPU with the same dtype, scaled by FLOPs per token."""
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
            scale = earlier.flops_per_token / config.flops_per_token
            basis = f"measured on this GPU by an earlier run, {folder.name}"
            return Throughput(statistics.median(rates[-LAST_STEPS:]) * scale, basis)
    return None


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
