"""Learning rate and momentum schedules: pure functions of the config and the step. No torch."""

import math
from dataclasses import dataclass
from typing import Any

from gpt.config.schema import OptimizerSection, RunConfig, ScheduleSection

REFERENCE_TOKENS_PER_STEP = 2**19
REFERENCE_N_EMBD = 768
ADAMW_LEARNING_RATE = 6e-4
MUON_LEARNING_RATE = 0.025
EMBEDDING_LEARNING_RATE = 0.7
HEAD_LEARNING_RATE = 0.004
INITIAL_MOMENTUM = 0.85
MIN_WARMUP_FRACTION = 0.01
"""Of a run that continues from a trained model; a choice of this project."""
MIN_BATCH_RATIO = 1 / 8
"""Below 2^16 tokens per step the rates stay the same: at 2^11 tokens, the rates for 2^16 and for
2^19 trained equally well, and the square root rule's were far worse (docs/benchmarks.md)."""


@dataclass(frozen=True)
class PeakLearningRates:
    """Peak learning rates of a run. With adamw all three are equal."""

    matrices: float
    embedding: float
    head: float
    """Of an untied head, of vectors, and of everything else that AdamW updates beside Muon."""


def peak_learning_rates(config: RunConfig) -> PeakLearningRates:
    """Return the rates in the config; derive those it leaves out.

    adamw: 6e-4 at width 768 (Brown et al. 2020, arXiv:2005.14165, table 2.1), times
    sqrt(768 / n_embd). muon: 0.025 for matrices, 0.7 for the embedding, 0.004 for the head
    (modded-nanogpt, track 3) at 2^19 tokens per step, all times sqrt(tokens_per_step / 2^19) down
    to 2^16 tokens, and AdamW's two times sqrt(768 / n_embd) (nanochat, scripts/base_train.py).
    """
    optimizer = config.optimizer
    width = math.sqrt(REFERENCE_N_EMBD / config.model.n_embd)
    if optimizer.name == "adamw":
        rate = optimizer.learning_rate or ADAMW_LEARNING_RATE * width
        return PeakLearningRates(rate, rate, rate)
    ratio = max(MIN_BATCH_RATIO, config.tokens_per_step / REFERENCE_TOKENS_PER_STEP)
    batch = math.sqrt(ratio)
    return PeakLearningRates(
        matrices=optimizer.learning_rate or MUON_LEARNING_RATE * batch,
        embedding=optimizer.embedding_learning_rate or EMBEDDING_LEARNING_RATE * batch * width,
        head=optimizer.head_learning_rate or HEAD_LEARNING_RATE * batch * width,
    )


def learning_rate_factor(schedule: ScheduleSection, step: int, max_steps: int) -> float:
    """Return the fraction of the peak learning rate for `step` (0 is the first step), in [0, 1].

    Linear warm-up that would reach 1 at step `warmup_steps`. Then, reaching
    `min_learning_rate_ratio` one step after the last: cosine, half a cosine (Loshchilov & Hutter
    2017, arXiv:1608.03983, without restarts); linear, 1 and then a straight line over the last
    `cooldown_fraction` of all steps (Hägele et al. 2024, arXiv:2405.18392).
    """
    assert 0 <= step < max_steps
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    floor = schedule.min_learning_rate_ratio
    if schedule.name == "cosine":
        progress = (step - schedule.warmup_steps) / (max_steps - schedule.warmup_steps)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    left = (max_steps - step) / (max_steps * schedule.cooldown_fraction)
    return floor + (1 - floor) * min(1.0, left)


def muon_momentum(optimizer: OptimizerSection, step: int, max_steps: int) -> float:
    """Return Muon's momentum for `step`: a linear warm-up from 0.85 (or the config's, if lower)."""
    warmup = min(optimizer.momentum_warmup_steps, max_steps // 10)
    first = min(INITIAL_MOMENTUM, optimizer.momentum)
    progress = min(1.0, step / warmup) if warmup else 1.0
    return first + (optimizer.momentum - first) * progress


def build_continuation_overrides(
    config: RunConfig, tokens: int, max_steps_limit: int | None = None
) -> dict[str, Any]:
    """Return the overrides of `config` for a run over `tokens` training tokens, each seen once:
    complete steps, at least one, at most `max_steps_limit`.

    The learning rate rises to the config's peak again and decays as in a run of that length:
    "re-warming and re-decaying" (Ibrahim et al. 2024, arXiv:2403.08763). The warm-up is the same
    fraction of the run as in the config, at least `MIN_WARMUP_FRACTION`. Optimizer states start
    from zero.
    """
    steps = max(1, tokens // config.tokens_per_step)
    if max_steps_limit is not None:
        steps = min(steps, max_steps_limit)
    fraction = max(MIN_WARMUP_FRACTION, config.schedule.warmup_steps / config.training.max_steps)
    warmup = min(steps - 1, math.ceil(fraction * steps))
    return {"training": {"max_steps": steps}, "schedule": {"warmup_steps": warmup}}
