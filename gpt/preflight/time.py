"""How much a run computes and writes, and how long a card needs for it."""

from __future__ import annotations

from dataclasses import dataclass

from gpt.config.schema import RunConfig, TrainingSection
from gpt.hardware.flops import flops_per_token
from gpt.hardware.gpus import GPUSpec
from gpt.preflight.parameters import count_parameters

GEFORCE_UTILISATION = 0.55
SERVER_UTILISATION = 0.40
"""Shares of a card's peak that training reaches, assumed where nobody measured: GeForce cards halve
the rate of their tensor cores for float32 sums, so memory holds them up less."""
UNCOMPILED_SHARE = 0.54
"""What is left of the pace when nothing is compiled: nanoGPT's readme has 135 ms an iteration
compiled and 250 ms not."""
NARROW = 448
"""Width under which launching kernels takes a share of the time that nobody has measured here."""
MEASURED_UTILISATION = {
    "rtx-4070": (0.82, "nanoGPT 124M at 56,000 tokens/s, a user's log"),
    "rtx-4090": (0.55, "nanoGPT 124M at 106,000 tokens/s, nanoGPT PR 225"),
    "h200": (0.42, "modded-nanogpt track 3 at 490,000 tokens/s"),
}
"""Others' runs on a card: tokens a second x `flops_per_token` / peak, and where from."""


@dataclass(frozen=True)
class Throughput:
    """How fast a card trains a model. None: the card is not known, and nobody guesses."""

    tokens_per_second: float | None
    basis: str
    """Where the figure comes from."""


def estimate_throughput(
    config: RunConfig, card: GPUSpec | None, measured: Throughput | None = None
) -> Throughput:
    """`measured` is this card's own, from runs before. Else the peak times a utilisation: one that
    others measured on the card, or one assumed."""
    if measured:
        return measured
    if card is None:
        return Throughput(None, "n/a: no card, or one that is not in the table")
    peak = card.peak_tflops(config.training.dtype)
    if peak is None:
        return Throughput(None, f"n/a: {card.name} has no tensor cores for {config.training.dtype}")
    if card.key in MEASURED_UTILISATION:
        share, source = MEASURED_UTILISATION[card.key]
        basis = f"{share:.0%} of {peak:g} TFLOP/s, as {source}"
    else:
        share = GEFORCE_UTILISATION if "GeForce" in card.name else SERVER_UTILISATION
        basis = f"{share:.0%} of {peak:g} TFLOP/s, assumed: nothing was measured on this card"
    if config.model.n_embd < NARROW:
        basis += "; narrow models reach less"
    if not config.training.compile:
        share, basis = share * UNCOMPILED_SHARE, f"{basis}; x {UNCOMPILED_SHARE} uncompiled"
    return Throughput(share * peak * 1e12 / flops_per_token(config), basis)


def total_tokens(config: RunConfig) -> int:
    """Tokens that the run asks for, repeats counted."""
    return config.training.max_steps * config.tokens_per_step


def hours(config: RunConfig, pace: Throughput) -> float | None:
    """Of training alone: tokenising, evaluations and checkpoints come on top."""
    if pace.tokens_per_second is None:
        return None
    return total_tokens(config) / pace.tokens_per_second / 3600


def checkpoint_bytes(config: RunConfig) -> int:
    """Weights and optimizer states in float32; AdamW keeps two numbers a parameter, Muon one."""
    parameters = count_parameters(config.model)
    once = parameters.block_matrices if config.optimizer.name == "muon" else 0
    return 4 * (3 * parameters.total - once)


def disk_bytes(config: RunConfig, shard_tokens: int) -> dict[str, int]:
    """What the run writes below `run.root`. `shard_tokens`: those that are not written yet."""
    return {
        "shards": 2 * shard_tokens,
        # The next one is complete before the oldest goes.
        "checkpoints": _checkpoints_at_once(config.training) * checkpoint_bytes(config),
        "model": 4 * count_parameters(config.model).total,
    }


def _checkpoints_at_once(training: TrainingSection) -> int:
    """The newest, the best, the one being written, and those kept for good."""
    every = training.checkpoint_keep_every
    return training.checkpoints_kept + 2 + (training.max_steps // every if every else 0)
