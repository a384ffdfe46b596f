"""Measure a device: its products, attention, bandwidth and launches, and real training steps."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt.artifacts import DatasetManifest, Split
from gpt.config.loading import build_config
from gpt.config.schema import RunConfig
from gpt.data.shards import ShardWriter
from gpt.errors import OutOfMemoryError
from gpt.hardware.calibration import Measurement
from gpt.hardware.device import compute_dtype, read_power_limit_watts
from gpt.model.base import attend
from gpt.model.compile import find_compiler_error
from gpt.training.optimizer import apply_schedule
from gpt.training.out_of_memory import find_batch_size
from gpt.training.step import TrainState

WARM_UP_STEPS = 3


def measure_card(device: torch.device, folder: Path, is_small: bool) -> Iterator[Measurement]:
    """Yield each measurement as it is taken, within three minutes on a GPU. Steps that do not fit
    into memory are left out.

    `folder`: where the random tokens of the steps are written. `is_small`: small sizes in seconds,
    for a CPU.
    """
    configs, seconds = _shipped_sizes(device, is_small), 0.05 if is_small else 2.0
    for name, unit, amount, call in _operations(device, configs):
        rate = amount / _time_call(device, seconds, call)
        yield Measurement(name=name, value=rate, unit=unit)
    if watts := read_power_limit_watts(device):
        yield Measurement(name="power limit", value=watts, unit="W")
    for number, config in enumerate(configs[:2]):
        with suppress(OutOfMemoryError):
            yield measure_steps(config, folder / str(number), 10 * seconds)


def _shipped_sizes(device: torch.device, is_small: bool) -> list[RunConfig]:
    """Return configs with the sizes of the shipped ones, or small ones."""
    compiles = device.type == "cuda" and not is_small and not find_compiler_error("cuda")
    widths = (64, 32) if is_small else (768, 480, 576, 720)
    n_layer, n_head, block_size, batch_size = (1, 2, 32, 2) if is_small else (12, 12, 1024, 16)
    model = {"n_layer": n_layer, "n_head": n_head, "block_size": block_size}
    training = {"batch_size": batch_size, "grad_acc": 4, "max_steps": 10_000}
    raw = {
        "run": {"name": "calibration"},
        "data": {"source": "random"},
        "training": {**training, "compile": compiles},
        "hardware": {"device": str(device)},
    }
    recipes = [("gpt2", "adamw"), *[("nanochat", "muon")] * (len(widths) - 1)]
    return [
        build_config(
            {
                **raw,
                "model": {**model, "architecture": architecture, "n_embd": width},
                "optimizer": {"name": optimizer},
            }
        )
        for width, (architecture, optimizer) in zip(widths, recipes, strict=True)
    ]


def _operations(
    device: torch.device, configs: Sequence[RunConfig]
) -> Iterator[tuple[str, str, float, Callable[[], object]]]:
    """Yield name, unit per second, how many of these units a call is, and the call."""
    model, batch_size = configs[0].model, configs[0].training.batch_size
    dtype = compute_dtype(device, configs[0].training.dtype)
    tokens = batch_size * model.block_size
    widths = sorted(config.model.n_embd for config in configs)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    for width in (*widths, tokens // 8):  # the last one is large enough for the peak
        product = partial(torch.matmul, random(tokens, width), random(width, 4 * width))
        yield f"product, width {width:,}", "TFLOP/s", 8e-12 * tokens * width**2, product
    for width in widths:
        shape = batch_size, model.n_head, model.block_size, width // model.n_head
        attention = partial(_run_attention, *(random(*shape).requires_grad_() for _ in range(4)))
        # Half of scores and sums, and 2.5 times that backward (FlashAttention-2, arXiv:2307.08691).
        flops = 7e-12 * tokens * model.block_size * width
        yield f"attention, head size {shape[-1]}", "TFLOP/s", flops, attention
    source = torch.zeros(2**14 * tokens, dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    yield "memory bandwidth", "GB/s", 2e-9 * source.numel(), copy
    yield "kernel launches", "per second", 1.0, partial(torch.zeros(1, device=device).add_, 1.0)


def _run_attention(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(attend(q, k, v, dropout=0.0, cache=None), (q, k, v), gradient)


def _time_call(device: torch.device, seconds: float, call: Callable[[], object]) -> float:
    """Return the mean seconds of a call among those enqueued without waiting, over `seconds`."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    call()  # allocates, and chooses kernels
    calls, elapsed = 1, 0.0
    while elapsed < seconds:
        calls *= 2
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        elapsed = time.perf_counter() - start
    return elapsed / calls


def measure_steps(config: RunConfig, folder: Path, seconds: float) -> Measurement:
    """Measure training steps on random tokens. The config of the result has the micro-batch that
    fits. Raises `OutOfMemoryError`."""
    on_gpu = config.hardware.device != "cpu"
    held_bytes = torch.cuda.memory_allocated() if on_gpu else 0
    state = TrainState(config, _write_random_tokens(folder, config))
    find_batch_size(state)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 * WARM_UP_STEPS or time.perf_counter() < end:
        start = time.perf_counter()
        run_step(state)
        times.append(time.perf_counter() - start)
    times = times[WARM_UP_STEPS:]
    per_step = config.sequences_per_step // state.batch_size
    fitted = {"batch_size": state.batch_size, "grad_acc": per_step}
    training = config.training.model_copy(update=fitted)
    return Measurement(
        name=f"training, {config.model.architecture}, width {config.model.n_embd}",
        value=config.tokens_per_step / statistics.median(times),
        unit="tokens/s",
        config=config.model_copy(update={"training": training}),
        steps=len(times),
        spread=statistics.stdev(times) / statistics.mean(times),
        peak_bytes=torch.cuda.max_memory_allocated() - held_bytes if on_gpu else None,
    )


def run_step(state: TrainState) -> None:
    """Take an optimizer step without the checks and the record of `gpt.training.loop.fit`."""
    apply_schedule(state.optimizers, state.config, state.step)
    loss = torch.zeros((), device=state.device)
    for batch, is_last in state.micro_batches():
        loss += state.forward_backward(batch, sync_gradients=is_last)
    state.clip_gradients(loss)
    state.update_weights()


def _write_random_tokens(folder: Path, config: RunConfig) -> DatasetManifest:
    folder.mkdir()
    tokens = 2 * config.tokens_per_step
    with ShardWriter(folder, "train", tokens) as writer:
        writer.write(np.random.default_rng(0).integers(0, 50_257, tokens))
        shards = writer.close()
    split = Split(shards=shards, documents=1, tokens=tokens, text_bytes=tokens)
    strings = dict.fromkeys(("fingerprint", "tokenizer", "ranks_sha256", "text_column"), "")
    about = {**strings, "validation_fraction": 0.5, "sources": (), "skipped": {}}
    return DatasetManifest(**about, folder=folder, train=split, validation=split)
