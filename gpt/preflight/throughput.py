"""Throughput of one GPU: one model for every card and shape, fitted to published measurements.

A micro-batch takes the sum of

- products: the FLOPs of its matrix products at the card's peak times an efficiency. It falls with
  the peak and for narrow widths, and depends on the generation and on whether the card is a
  GeForce, which multiplies at half rate and then reaches it. Attention kernels pad heads to 32,
  64, 96, 128, 192 or 256 channels (flash-attention);
- memory: element-wise kernels, norms and the loss per token, and weights and gradients per
  micro-batch, at the card's bandwidth;
- launches: a constant per layer.

An optimizer step adds the update. The efficiencies are in `gpt/hardware/efficiency.toml`, fitted by
`tests/benchmarks/fit_throughput.py` to `gpt/hardware/measurements.csv`. They are those of plain
compiled loops like nanoGPT's: what ours gains by its fused loss was not measured on a card, so the
model claims nothing for it.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gpt.hardware
from gpt.config.schema import RunConfig
from gpt.hardware.gpus import GPUSpec
from gpt.preflight.parameters import count_parameters

KERNEL_HEADS = (32, 64, 96, 128, 192, 256)
BLOCK_BYTES = 150
"""Per token, layer and channel: element-wise kernels and norms, forward and backward."""
LOGIT_BYTES = 10
"""Per token and entry of the vocabulary: written, read by softmax; its gradient written, read."""
WEIGHT_BYTES = 20
"""Per parameter and micro-batch: cast to 16 bits, read forward and backward, gradient summed."""
UPDATE_BYTES = 28
"""Per parameter: weight and two states read and written, gradient read, in float32."""
NEWTON_SCHULZ_SHARE = 0.2
"""Efficiency of Muon's small products relative to those of a step; assumed, and 1% of the time."""
UNCOMPILED_SHARE = 0.54
"""Throughput without compilation, as a share: nanoGPT's README has 135 ms per iteration with and
250 ms without."""
GENERATIONS = {7: "turing", 9: "hopper", 10: "blackwell", 12: "blackwell"}
"""By major compute capability. Volta and Turing have no FlashAttention and no bfloat16; no
measurement of Turing was found, so it has Volta's factor."""


@dataclass(frozen=True)
class Shape:
    """What the time of a step depends on beside the card."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    batch_size: int
    grad_acc: int
    parameters: int
    is_muon: bool
    is_compiled: bool = True
    is_checkpointed: bool = False

    @property
    def micro_batch_tokens(self) -> int:
        return self.batch_size * self.block_size

    @property
    def product_flops(self) -> float:
        """Per token, with what attention kernels pad."""
        head = self.n_embd // self.n_head
        kernel = next((size for size in KERNEL_HEADS if size >= head), head)
        attention = 12 * self.n_layer * self.block_size * self.n_head * kernel
        blocks = self._passes * (72 * self.n_layer * self.n_embd**2 + attention)
        return blocks + 6 * self.vocab_size * self.n_embd

    @property
    def _passes(self) -> float:
        """Work in blocks relative to forward and backward; checkpointing repeats forward."""
        return 4 / 3 if self.is_checkpointed else 1

    @property
    def memory_bytes(self) -> float:
        """Per token."""
        blocks = self._passes * BLOCK_BYTES * self.n_layer * self.n_embd
        return blocks + LOGIT_BYTES * self.vocab_size

    @property
    def update_flops(self) -> float:
        """Five Newton-Schulz steps: 30 width^3 for a square matrix, 90 for one of the MLP."""
        return 300 * self.n_layer * self.n_embd**3 if self.is_muon else 0


def describe_shape(config: RunConfig) -> Shape:
    """Return what the time of the config's steps depends on, on one device."""
    model, training = config.model, config.training
    return Shape(
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_embd=model.n_embd,
        block_size=model.block_size,
        vocab_size=model.vocab_size,
        batch_size=training.batch_size,
        grad_acc=training.grad_acc // config.hardware.world_size,
        parameters=count_parameters(model).total,
        is_muon=config.optimizer.name == "muon",
        is_compiled=training.compile,
        is_checkpointed=training.activation_checkpointing,
    )


Efficiency = Mapping[str, float]
"""The fitted values by name, and `run_error` and `card_error`, the relative errors for a run, and
for all runs of a card, that the fit left out."""


@cache
def load_efficiency() -> Efficiency:
    """Return the fitted efficiencies."""
    path = Path(gpt.hardware.__file__).with_name("efficiency.toml")
    values: dict[str, float] = tomllib.loads(path.read_text(encoding="utf-8"))
    return values


def generation(gpu: GPUSpec) -> str:
    """Return the name of the GPU's factor."""
    major, minor = gpu.compute_capability
    return GENERATIONS.get(major) or ("ada" if (major, minor) == (8, 9) else "ampere")


def _product_rate(gpu: GPUSpec, tflops: float, width: int, efficiency: Efficiency) -> float:
    """Return FLOPs per second of a step's matrix products."""
    share = efficiency["products"] * (tflops / 100) ** -efficiency["peak_exponent"]
    share *= efficiency[generation(gpu)]
    if "GeForce" not in gpu.name:
        share *= efficiency["full_rate"]
    return tflops * 1e12 * share / (1 + efficiency["width"] / width)


def step_seconds(shape: Shape, gpu: GPUSpec, tflops: float, efficiency: Efficiency) -> float:
    """Return the seconds of an optimizer step on a card with a peak of `tflops`."""
    rate = _product_rate(gpu, tflops, shape.n_embd, efficiency)
    bandwidth = gpu.bandwidth_gbs * 1e9 * efficiency["memory"]
    per_token = shape.product_flops / rate + shape.memory_bytes / bandwidth
    launches = shape.n_layer * efficiency["launch_seconds"]
    weights = shape.parameters * WEIGHT_BYTES / bandwidth
    micro_batch = shape.micro_batch_tokens * per_token + weights + launches
    if not shape.is_compiled:
        micro_batch /= UNCOMPILED_SHARE
    update = shape.parameters * UPDATE_BYTES / bandwidth
    update += shape.update_flops / (rate * NEWTON_SCHULZ_SHARE)
    return shape.grad_acc * micro_batch + update
