"""Measure the memory of a training step under fake tensors: nothing is allocated or computed."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from gpt.config.loading import build_config
from gpt.config.schema import RunConfig
from gpt.model.architectures import ARCHITECTURES
from gpt.model.loss import linear_cross_entropy
from gpt.training.optimizer import build_optimizers


def make_config(
    architecture: str,
    optimizer: str,
    dtype: str,
    size: tuple[int, int, int],
    batch: tuple[int, int],
    dropout: float = 0.0,
    **training: object,
) -> RunConfig:
    """`size`: layers, heads, width; `batch`: sequences, block size."""
    n_layer, n_head, n_embd = size
    return build_config(
        {
            "run": {"name": "grid"},
            "model": {
                "architecture": architecture,
                "n_layer": n_layer,
                "n_head": n_head,
                "n_embd": n_embd,
                "block_size": batch[1],
                "dropout": dropout,
            },
            "data": {"source": "none.parquet"},
            "optimizer": {"name": optimizer},
            "training": {
                "batch_size": batch[0],
                "grad_acc": 2,
                "max_steps": 10,
                "dtype": dtype,
                "loss_chunk_rows": 2048,
                "compile": False,
                **training,
            },
        }
    )


def measure_peak_bytes(config: RunConfig) -> int:
    """Measure the peak of one step with the real network, loss and optimizers, uncompiled: forward
    and backward passes, clipping, update. Optimizer states exist from the start, as in every step
    but the first. Tensors are on the CPU, because every build of torch has it."""
    cpu = torch.device("cpu")
    with FakeTensorMode():
        model = ARCHITECTURES[config.model.architecture](config.model)
        model.activation_checkpointing = config.training.activation_checkpointing
        # The optimizers of a GPU: on a CPU Muon computes in another dtype.
        optimizers = build_optimizers(model, config, torch.device("cuda"))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        _update(optimizers)
        tracker = MemTracker()
        tracker.track_external(model, *optimizers)
        with tracker:
            for _ in range(config.training.grad_acc):
                tracker.reset_mod_stats()
                _micro_step(model, config)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            _update(optimizers)
        return int(tracker.get_tracker_snapshot("peak")[cpu]["Total"])


def _micro_step(model: torch.nn.Module, config: RunConfig) -> None:
    shape = config.training.batch_size, config.model.block_size
    inputs, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    low = config.training.dtype != "float32"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        summed = linear_cross_entropy(
            model(inputs),
            model.head,
            targets,
            model.logit_softcap,
            config.training.loss_chunk_rows,
        )
    (summed / config.tokens_per_step).backward()


def _update(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
