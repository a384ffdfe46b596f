"""Length and learning rate schedule of a run that continues from a trained model."""

import math
from typing import Any

from gpt.config.schema import RunConfig

MIN_WARMUP_FRACTION = 0.01


def build_continuation_overrides(
    config: RunConfig, tokens: int, max_steps_limit: int | None = None
) -> dict[str, Any]:
    """Return the overrides of `config` for a run over `tokens` training tokens, each seen once:
    complete steps, at least one, at most `max_steps_limit`.

    The learning rate rises to the config's peak again and decays as in a run of that length:
    "re-warming and re-decaying" (Ibrahim et al. 2024, arXiv:2403.08763). The warm-up is the same
    fraction of the run as in the config, at least `MIN_WARMUP_FRACTION`, a choice of this project.
    Optimizer states start from zero.
    """
    steps = max(1, tokens // config.tokens_per_step)
    if max_steps_limit is not None:
        steps = min(steps, max_steps_limit)
    fraction = max(MIN_WARMUP_FRACTION, config.schedule.warmup_steps / config.training.max_steps)
    warmup = min(steps - 1, math.ceil(fraction * steps))
    return {"training": {"max_steps": steps}, "schedule": {"warmup_steps": warmup}}
