"""Train a small GPT from Python, without a workflow: no Prefect, no MLflow, no config file.

    python examples/train.py data/sample.parquet

`make run` writes data/sample.parquet. Run the script again to resume it after an interruption.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from gpt.config.loading import build_config
from gpt.data.tokenize.pipeline import find_dataset, tokenize_corpus
from gpt.evaluation.heldout import heldout_loss
from gpt.model.generate import SamplingParams, generate
from gpt.model.io import load_model
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.loop import train


def main(source: str, root: Path = Path("runs"), steps: int = 100) -> float:
    """Tokenize, train, evaluate and sample; return the held-out loss in nats per token."""
    config = build_config(
        {
            "run": {"name": "example", "root": str(root)},
            "model": {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64},
            "data": {"source": source, "validation_fraction": 0.1},
            "optimizer": {"learning_rate": 3e-3},
            "training": {"batch_size": 4, "grad_acc": 2, "max_steps": steps, "compile": False},
            "evaluation": {"interval": 20, "tokens": 4_096},
        }
    )
    for _ in tokenize_corpus(config):  # yields progress several times per second
        pass
    dataset = find_dataset(config)
    assert dataset
    print(f"{dataset.train.tokens:,} training tokens in {dataset.folder}")

    folder = root / "train" / "example"
    for record in train(config, dataset, folder):  # one record per step, and one per evaluation
        if record.validation:
            print(f"step {record.step}: validation loss {record.validation.loss:.4f}")

    checkpoint = latest_checkpoint(folder)
    assert checkpoint
    model = load_model(checkpoint.folder, torch.device("cpu"))
    result = heldout_loss(model, config, dataset)
    print(f"loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte")
    print(generate(model, "The", SamplingParams(max_tokens=32)))
    return result.loss


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "data/sample.parquet")
