"""Synthetic results of a comparison."""

from __future__ import annotations

import numpy as np

from gpt.artifacts import EvaluationReport, Sample
from gpt.evaluation.comparison import ConfigResult, RunResult

RNG = np.random.default_rng(7)
TEXT_LOSSES = RNG.normal(3.5, 0.5, 400)
"""Difficulty of each sequence, the same for every model."""


def report(better_by: float = 0.0, noise: float = 0.02, count: int = 400, **changes):
    losses = TEXT_LOSSES[:count] - better_by + RNG.normal(0, noise, count)
    losses += TEXT_LOSSES[:count].mean() - better_by - losses.mean()  # better by exactly that
    values = {
        "step": 9,
        "tokens": 128 * count,
        "loss": float(losses.mean()),
        "perplexity": 30.0,
        "bits_per_byte": 1.1,
        "samples": (Sample(prompt="The", text=" <b>end</b>"),),
        "standard_error": float(losses.std(ddof=1) / count**0.5),
        "slice_fingerprint": "a" * 16,
        "sequence_losses": tuple(losses.tolist()),
    }
    return EvaluationReport(**(values | changes))


def run_result(better_by=0.0, parameters=1_000, tokens=50_000, **changes) -> RunResult:
    curve = ((0, 0.0, 10.0), (25_000, 0.1, 5.0), (tokens, 0.2, 3.5))
    values = {
        "parameters": parameters,
        "report": report(better_by),
        "tokens_per_second": 1234.5,
        "hours": 0.2,
        "peak_memory_bytes": 3 * 2**30,
        "energy_joules": None,
    }
    return RunResult(tokens=tokens, curve=curve, **(values | changes))


def config_result(name, *runs, failures=()) -> ConfigResult:
    return ConfigResult(name, runs, failures)
