"""Add an architecture and compare it with GPT-2, without changing the package.

    python examples/add_architecture.py data/sample.parquet

The new network computes attention and MLP of a block in parallel, as GPT-NeoX does (Black et al.
2022, arXiv:2204.06745). CONTRIBUTING.md says how to add an architecture for good, with its name in
the config and its memory in the preflight.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor, nn

from gpt.artifacts import DatasetManifest
from gpt.config.loading import build_config
from gpt.config.schema import ModelSection, RunConfig
from gpt.data.tokenize.pipeline import find_dataset, tokenize_corpus
from gpt.model.architectures import ARCHITECTURES
from gpt.model.gpt2 import GPT2, GPT2Block
from gpt.model.kv_cache import LayerKVCache
from gpt.training.loop import train


class ParallelBlock(GPT2Block):
    def forward(self, x: Tensor, cache: LayerKVCache | None = None) -> Tensor:
        """(batch, time, n_embd) -> the same."""
        return x + self.attn(self.ln_1(x), cache) + self.mlp(self.ln_2(x))


class ParallelGPT2(GPT2):
    def __init__(self, config: ModelSection) -> None:
        super().__init__(config)
        self.h = nn.ModuleList(ParallelBlock(config) for _ in range(config.n_layer))


ARCHITECTURES["parallel-gpt2"] = ParallelGPT2


def main(source: str, root: Path = Path("runs"), steps: int = 100) -> dict[str, float]:
    """Train both networks on the same data; return the validation loss of each."""
    config = build_config(
        {
            "run": {"name": "parallel", "root": str(root)},
            "model": {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 64},
            "data": {"source": source, "validation_fraction": 0.1},
            "optimizer": {"learning_rate": 3e-3},
            "training": {"batch_size": 4, "grad_acc": 2, "max_steps": steps, "compile": False},
            "evaluation": {"interval": steps, "tokens": 4_096},
        }
    )
    for _ in tokenize_corpus(config):  # yields progress several times per second
        pass
    dataset = find_dataset(config)
    assert dataset
    losses = {name: train_one(config, name, dataset) for name in ("gpt2", "parallel-gpt2")}
    for name, loss in losses.items():
        print(f"{name}: validation loss {loss:.4f}")
    return losses


def train_one(config: RunConfig, architecture: str, dataset: DatasetManifest) -> float:
    """Train from scratch; return the last validation loss in nats per token."""
    # model_copy does not validate: the schema lists the architectures of the package only.
    model = config.model.model_copy(update={"architecture": architecture})
    config = config.model_copy(update={"model": model})
    loss = float("nan")
    for record in train(config, dataset, config.run.root / "train" / architecture):
        if record.validation:
            loss = record.validation.loss
    return loss


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "data/sample.parquet")
