"""Compare the preflight's memory estimate with measurements over a grid of configs.

    python tests/benchmarks/bench_memory.py                 # MemTracker under fake tensors
    python tests/benchmarks/bench_memory.py --device cuda   # torch.cuda.max_memory_allocated

Prints a line per config and the largest error; exits 1 if that exceeds 10%. On the CPU `--points N`
selects N of the grid's 320 configs by a seed, `--points 0` all of them (an hour on one core), and
`--part K/N` the K-th of N equal parts. On a GPU it runs two real steps at widths 480, 576, 720 and
768 and batch sizes 4, 8 and 16, with and without compiling.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from step_memory import make_config, measure_peak_bytes

from gpt.config.schema import RunConfig
from gpt.hardware.device import autocast
from gpt.model.architectures import build_model
from gpt.model.compile import compile_if_supported
from gpt.model.loss import linear_cross_entropy
from gpt.preflight.memory import estimate_memory
from gpt.training.optimizer import build_optimizers

MIB = 2**20


def fake_points(
    count: int, seed: int, part: tuple[int, int], chunk_rows: int
) -> Iterator[tuple[RunConfig, int, int]]:
    """Yield config, estimate and measurement."""
    networks = [("gpt2", "adamw"), ("nanochat", "muon")]
    sizes = [(2, 2, 128), (4, 6, 384), (12, 12, 576), (12, 12, 768), (24, 16, 1024)]
    batches = list(itertools.product((1, 4, 8, 32), (256, 512, 1024, 2048)))
    grid = list(itertools.product(networks, ("float32", "bfloat16"), sizes, batches))
    if count:
        grid = random.Random(seed).sample(grid, count)
    number, parts = part
    for network, dtype, size, batch in grid[number - 1 :: parts]:
        config = make_config(*network, dtype, size, batch, loss_chunk_rows=chunk_rows)
        yield config, estimate_memory(config).peak_bytes, measure_peak_bytes(config)


def cuda_points() -> Iterator[tuple[RunConfig, int, int]]:
    networks = [("gpt2", "adamw"), ("nanochat", "muon")]
    for network, width, batch, compiling in itertools.product(
        networks, (480, 576, 720, 768), (4, 8, 16), (False, True)
    ):
        config = make_config(
            *network, "bfloat16", (12, 12, width), (batch, 1024), compile=compiling
        )
        estimate = estimate_memory(config)
        yield config, estimate.compiled_bytes, measure_allocated_bytes(config)


def measure_allocated_bytes(config: RunConfig) -> int:
    """Measure the second of two training steps."""
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    model = build_model(config.model).to(device)
    network = compile_if_supported(model, device) if config.training.compile else model
    optimizers = build_optimizers(model, config)
    shape = config.training.batch_size, config.model.block_size
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(config.training.grad_acc):
            inputs, targets = torch.randint(config.model.vocab_size, (2, *shape), device=device)
            with autocast(device, config.training.dtype):
                summed = linear_cross_entropy(
                    network(inputs),
                    model.head,
                    targets,
                    model.logit_softcap,
                    config.training.loss_chunk_rows,
                    config.training.compile,
                )
            (summed / config.tokens_per_step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument(
        "--part", type=lambda text: tuple(map(int, text.split("/"))), default=(1, 1)
    )
    parser.add_argument("--chunk-rows", type=int, default=2048)
    arguments = parser.parse_args()
    fake = arguments.device == "cpu"
    options = (arguments.points, arguments.seed, arguments.part, arguments.chunk_rows)
    points = fake_points(*options) if fake else cuda_points()
    worst = 0.0
    for config, estimate, measured in points:
        error = estimate / measured - 1
        worst = max(worst, abs(error))
        model, training = config.model, config.training
        print(
            f"{model.architecture:8} {training.dtype:8} {model.n_layer:2}/{model.n_head}/"
            f"{model.n_embd:<4} {training.batch_size:2} x {model.block_size:4} "
            f"chunk {training.loss_chunk_rows:4} compile {training.compile!s:5} "
            f"estimate {estimate / MIB:8,.0f} MiB  measured {measured / MIB:8,.0f}  {error:+.2%}",
            flush=True,
        )
    print(f"worst {worst:.2%}")
    return int(worst > 0.1)


if __name__ == "__main__":
    sys.exit(main())
