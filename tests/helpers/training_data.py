"""Small training configs, and what a run of one leaves behind."""

from __future__ import annotations

import dataclasses

from gpt.config.loading import build_config
from gpt.training.checkpoint.retention import latest_checkpoint


def tiny_config(root, **changes):
    raw = {
        "run": {"name": "t", "root": str(root)},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "dropout": 0.1},
        "data": {"source": "unused.parquet"},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 3},
        "training": {
            "batch_size": 4,
            "grad_acc": 2,
            "max_steps": 20,
            "checkpoint_interval": 10,
            "compile": False,
        },
        "evaluation": {"interval": 10, "tokens": 640, "batch_size": 4},
        "hardware": {"device": "cpu"},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section][name] = value
    return build_config(raw)


def small_config(root, **changes):
    """As `tiny_config`, with a quarter of the tokens: for tests that train often."""
    return tiny_config(root, **{"model__block_size": 8, "evaluation__tokens": 64, **changes})


def numbers(records):
    """What must be equal in two runs: everything but speed and memory."""
    return [
        dataclasses.replace(record, tokens_per_second=None, peak_memory_bytes=None)
        for record in records
    ]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(latest_checkpoint(folder).folder / "model.safetensors")
