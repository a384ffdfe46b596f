"""How a model is trained on: the length and the schedule of a run that begins with its weights."""

from __future__ import annotations

import math
from typing import Any

from gpt.config.schema import RunConfig

LEAST_WARMUP = 0.01
"""Share of the steps over which the learning rate rises again at least."""


def build_continuation_overrides(
    config: RunConfig, tokens: int, max_steps_limit: int | None = None
) -> dict[str, Any]:
    """Values to lay over `config` for a run over `tokens` training tokens, each seen once: whole
    steps, at least one, at most `max_steps_limit`.

    The learning rate rises to the config's highest once more and falls as in a run of that length:
    "re-warming and re-decaying" (Ibrahim et al. 2024, arXiv:2403.08763). The warm-up is as long a
    part of the run as the config's is of its own length, 1% at least, a choice of ours. The
    optimizer's states begin anew.
    """
    steps = max(1, tokens // config.tokens_per_step)
    if max_steps_limit is not None:
        steps = min(steps, max_steps_limit)
    share = max(LEAST_WARMUP, config.schedule.warmup_steps / config.training.max_steps)
    warmup = min(steps - 1, math.ceil(share * steps))
    return {"training": {"max_steps": steps}, "schedule": {"warmup_steps": warmup}}
