"""What makes a run this run: everything that shapes its weights, at every step.

Model, data, optimizer, schedule, seed and the tokens of a step. What may change on the way (steps,
intervals, how a step is split into micro-batches, how memory is saved, device, tracking) is not
part of it.
"""

from __future__ import annotations

from typing import Any

from gpt.config.schema import RunConfig, fingerprint

_FREE_SECTIONS = ("run", "data", "evaluation", "tracking", "hardware")
_FREE_KEYS = (
    "training.max_steps",
    "training.batch_size",
    "training.grad_acc",
    "training.compile",
    "training.loss_chunk_rows",
    "training.activation_checkpointing",
    "training.checkpoint_interval",
    "training.checkpoints_kept",
    "training.checkpoint_keep_every",
    "training.spike_sigma",
    "training.recovery_attempts",
    "training.log_interval",
)


def identity_values(config: RunConfig, dataset_fingerprint: str) -> dict[str, Any]:
    """By dotted key; `sequences_per_step` stands for batch_size * grad_acc."""
    kept = {
        key: value
        for key, value in config.flatten().items()
        if key.split(".")[0] not in _FREE_SECTIONS and key not in _FREE_KEYS
    }
    if not kept["training.init_from"]:  # runs of before that key stay the runs they are
        del kept["training.init_from"]
    kept["sequences_per_step"] = config.sequences_per_step
    kept["dataset"] = dataset_fingerprint
    return kept


def run_identity(config: RunConfig, dataset_fingerprint: str) -> str:
    """Fingerprint of what shapes the weights."""
    return fingerprint(identity_values(config, dataset_fingerprint))
