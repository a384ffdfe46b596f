"""The identity of a run: the settings that determine its weights at every step.

These are model, data, optimizer, schedule, seed and the tokens per step. Settings that may change
between two starts of a run are not part of it: steps, intervals, the split of a step into
micro-batches, memory savings, device, tracking.
"""

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
    """Return these settings by dotted key; `sequences_per_step` is batch_size * grad_acc."""
    values = {
        key: value
        for key, value in config.flatten().items()
        if key.split(".")[0] not in _FREE_SECTIONS and key not in _FREE_KEYS
    }
    if not values["training.init_from"]:  # runs older than this key keep their identity
        del values["training.init_from"]
    values["sequences_per_step"] = config.sequences_per_step
    values["dataset"] = dataset_fingerprint
    return values


def run_identity(config: RunConfig, dataset_fingerprint: str) -> str:
    """Return the fingerprint of `identity_values`."""
    return fingerprint(identity_values(config, dataset_fingerprint))
