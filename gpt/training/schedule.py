"""The learning rate of each step: pure functions of the config and the step."""

from __future__ import annotations

import math

from gpt.config import ScheduleSection


def learning_rate_factor(schedule: ScheduleSection, step: int, max_steps: int) -> float:
    """Share of the highest learning rate for `step` (0 is the first step), in (0, 1].

    Linear warm-up that reaches 1 at step `warmup_steps`; then half a cosine that would reach
    `min_learning_rate_ratio` one step after the last (Loshchilov & Hutter 2017,
    arXiv:1608.03983, without restarts).
    """
    assert 0 <= step < max_steps
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    progress = (step - schedule.warmup_steps) / (max_steps - schedule.warmup_steps)
    floor = schedule.min_learning_rate_ratio
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
