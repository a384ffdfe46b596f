"""The preflight's parameter count and memory estimate against the real models."""

from __future__ import annotations

import random

import pytest
import torch
from step_memory import make_config, measure_peak_bytes

from gpt.config.schema import ModelSection, RunConfig
from gpt.hardware.gpus import find_gpu
from gpt.model.architectures import ARCHITECTURES
from gpt.model.loss import default_chunk_rows
from gpt.preflight.memory import CPU_CHUNK_ROWS, CUDA_CHUNK_ROWS, estimate_memory
from gpt.preflight.parameters import count_parameters


def test_parameter_count_equals_the_built_model() -> None:
    chance = random.Random(4)
    for _ in range(200):
        n_head = chance.randint(1, 16)
        model = ModelSection(
            architecture=chance.choice(["gpt2", "nanochat"]),
            n_layer=chance.randint(1, 24),
            n_head=n_head,
            n_embd=n_head * 2 * chance.randint(1, 48),
            block_size=chance.randint(1, 2048),
            vocab_size=chance.randint(50_257, 65_536),
            bias=chance.random() < 0.5,
        )
        with torch.device("meta"):
            built = ARCHITECTURES[model.architecture](model)
        assert count_parameters(model).total == built.num_parameters(), model


GRID: list[RunConfig] = [
    # Peaks at each moment; every dtype, optimizer and setting. Few layers: those only add up. The
    # complete grid is in tests/benchmarks/bench_memory.py.
    make_config("gpt2", "adamw", "bfloat16", (12, 12, 576), (16, 1024)),
    make_config("gpt2", "adamw", "float32", (2, 2, 128), (1, 256)),
    make_config("gpt2", "adamw", "bfloat16", (2, 16, 1024), (1, 256)),
    make_config("gpt2", "muon", "float32", (2, 16, 1024), (32, 2048)),
    make_config("gpt2", "muon", "bfloat16", (2, 8, 512), (8, 1024), grad_acc=1),
    make_config("gpt2", "adamw", "bfloat16", (2, 12, 720), (8, 1024)),
    make_config("gpt2", "adamw", "bfloat16", (2, 8, 512), (8, 512), activation_checkpointing=True),
    make_config("gpt2", "adamw", "float32", (2, 8, 512), (16, 512), loss_chunk_rows=256),
    make_config("nanochat", "adamw", "bfloat16", (2, 2, 128), (1, 256)),
    make_config("nanochat", "muon", "float32", (2, 16, 1024), (32, 2048)),
    make_config("nanochat", "muon", "bfloat16", (2, 12, 768), (4, 1024)),
    # Deep, so that the blocks need more than the loss.
    make_config("nanochat", "muon", "bfloat16", (12, 12, 576), (8, 1024)),
    make_config("nanochat", "adamw", "float32", (2, 8, 512), (8, 512), grad_acc=1),
    make_config(
        "nanochat", "muon", "bfloat16", (2, 8, 512), (32, 256), activation_checkpointing=True
    ),
]


def test_peak_is_within_ten_percent_of_mem_tracker(capsys: pytest.CaptureFixture[str]) -> None:
    worst = 0.0, GRID[0]
    for config in GRID:
        estimate, measured = estimate_memory(config).peak_bytes, measure_peak_bytes(config)
        error = abs(estimate / measured - 1)
        assert error < 0.1, f"{config.model}: {estimate:,} against {measured:,}"
        worst = max(worst, (error, config), key=lambda pair: pair[0])
    with capsys.disabled():
        print(f"\nmemory: worst of {len(GRID)} points {worst[0]:.2%}, at {worst[1].model}")


def test_parts_add_up_and_overheads_come_on_top() -> None:
    memory = estimate_memory(make_config("gpt2", "adamw", "bfloat16", (12, 12, 576), (16, 1024)))
    assert sum(memory.parts.values()) == memory.peak_bytes == memory.compiled_bytes
    assert memory.needed_bytes == memory.peak_bytes + sum(memory.overheads.values())
    assert set(memory.overheads) == {"cuda_context", "allocator", "compiled_buffers"}


@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
def test_memory_savings_reduce_the_peak(architecture: str) -> None:
    def peak(**training: object) -> int:
        size, batch = (12, 12, 768), (16, 1024)
        return estimate_memory(
            make_config(architecture, "adamw", "bfloat16", size, batch, **training)
        ).compiled_bytes

    eager = peak()
    assert peak(compile=True) < eager
    assert peak(loss_chunk_rows=256) < eager
    assert peak(activation_checkpointing=True) < eager
    assert peak(batch_size=8) < eager


def test_chunk_rows_equal_those_of_the_loss() -> None:
    assert default_chunk_rows(torch.device("cuda"), True) == CUDA_CHUNK_ROWS
    assert default_chunk_rows(torch.device("cpu"), True) == CPU_CHUNK_ROWS


def test_padded_heads_need_more_memory() -> None:
    padded = make_config("gpt2", "adamw", "bfloat16", (12, 12, 720), (16, 1024))
    aligned = make_config("gpt2", "adamw", "bfloat16", (12, 15, 720), (16, 1024))
    assert estimate_memory(padded).peak_bytes > 1.03 * estimate_memory(aligned).peak_bytes


@pytest.mark.parametrize(
    ("gpu", "dtype", "heads", "kernel"),
    [
        ("rtx-4070", "bfloat16", 12, "FlashAttention"),
        ("rtx-4070", "float32", 12, "memory-efficient"),
        ("rtx-4070", "bfloat16", 2, "memory-efficient"),
        ("t4", "bfloat16", 12, "memory-efficient"),
        (None, "bfloat16", 12, "FlashAttention"),
    ],
)
def test_gpu_dtype_and_head_size_decide_on_the_attention_kernel(
    gpu: str | None, dtype: str, heads: int, kernel: str
) -> None:
    config = make_config("nanochat", "muon", dtype, (2, heads, 768), (8, 1024))
    memory = estimate_memory(config, gpu=find_gpu(gpu) if gpu else None)
    assert memory.attention == kernel


def test_only_nanochat_with_flash_attention_copies_the_output_of_attention() -> None:
    t4 = find_gpu("t4")
    for architecture, copied_bytes in (("gpt2", 0), ("nanochat", 12 * 2 * 16 * 1024 * 768)):
        config = make_config(architecture, "adamw", "bfloat16", (12, 12, 768), (16, 1024))
        flash, efficient = estimate_memory(config), estimate_memory(config, gpu=t4)
        assert flash.peak_bytes - efficient.peak_bytes == copied_bytes
    padded = make_config("nanochat", "muon", "bfloat16", (12, 12, 720), (16, 1024))
    assert estimate_memory(padded).peak_bytes == estimate_memory(padded, gpu=t4).peak_bytes
