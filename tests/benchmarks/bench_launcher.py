"""Measure the overhead of torch's launcher: one process through it against the direct loop.

    python tests/benchmarks/bench_launcher.py --dataset FOLDER [--device cuda] [--turns 5]

The two alternate, each turn a new run, so that other load on the machine affects both alike. The
seconds per step come from the loop itself, without the first ten steps, which compile and warm up.
Prints both medians and their ratio per turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from flows.runtime.environment import COMPUTE

os.environ |= COMPUTE  # the workflow's settings, before torch is imported

from gpt.artifacts import DatasetManifest
from gpt.config.loading import build_config
from gpt.config.schema import RunConfig
from gpt.data.shards import read_manifest
from gpt.training.distributed.launch import RunSpec, WorkerSpec, launch_workers
from gpt.training.loop import train
from gpt.training.metrics import StepRecord

WARM_UP = 10


def main() -> None:
    options = arguments()
    dataset = read_manifest(Path(options.dataset))
    turns = []
    for number in range(options.turns):
        direct, through = (measure(options, dataset, way) for way in (directly, by_launcher))
        turns.append({"direct_seconds": direct, "launcher_seconds": through})
        print(f"turn {number + 1}: {direct:.4f} s, {through:.4f} s, ratio {through / direct:.3f}")
    ratios = [turn["launcher_seconds"] / turn["direct_seconds"] for turn in turns]
    print(f"median ratio {statistics.median(ratios):.3f}")
    if options.json:
        Path(options.json).write_text(json.dumps(turns, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset", required=True, help="folder of a tokenized dataset")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def measure(options: argparse.Namespace, dataset: DatasetManifest, way) -> float:
    """Return the median seconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(options, folder)
        records = [r for r in way(config, dataset, Path(folder) / "run") if r.loss is not None]
    seconds = [config.tokens_per_step / record.tokens_per_second for record in records[WARM_UP:]]
    return statistics.median(seconds)


def config_of(options: argparse.Namespace, root: str) -> RunConfig:
    return build_config(
        {
            "run": {"name": "launcher", "root": root},
            "model": {
                "n_layer": options.n_layer,
                "n_head": options.n_embd // 32,
                "n_embd": options.n_embd,
                "block_size": options.block_size,
            },
            "data": {"source": "unused"},
            "training": {
                "batch_size": options.batch_size,
                "grad_acc": 1,
                "max_steps": options.steps,
                "checkpoint_interval": options.steps,
            },
            "evaluation": {"interval": options.steps, "tokens": options.block_size},
            "hardware": {"device": options.device},
        }
    )


def directly(config: RunConfig, dataset: DatasetManifest, folder: Path) -> Iterator[StepRecord]:
    return train(config, dataset, folder)


def by_launcher(config: RunConfig, dataset: DatasetManifest, folder: Path) -> Iterator[StepRecord]:
    folder.mkdir()
    return launch_workers(
        WorkerSpec(config=config, run=RunSpec(dataset=dataset, folder=folder)), folder
    )


if __name__ == "__main__":
    main()
