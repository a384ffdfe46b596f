"""Whether two models differ: their losses on the same text, and how far chance alone would go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gpt.artifacts import EvaluationReport

CONFIDENCE = 0.95


@dataclass(frozen=True)
class LossDifference:
    """Of two mean losses, nats a token; below zero the first is the better one."""

    mean: float
    low: float | None
    high: float | None
    """Ends of the 95% confidence interval; None where one value a side tells nothing of chance."""
    basis: str
    """What chance was measured over, in words."""

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and self.low * self.high > 0

    @property
    def is_significantly_better(self) -> bool:
        """The first is better by more than chance."""
        return self.is_significant and self.mean < 0


def compare_reports(one: EvaluationReport, other: EvaluationReport) -> LossDifference:
    """Of two models on one slice: paired over its sequences, because a hard text is hard for both
    (Student's t; Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640). Models of different
    block sizes have other sequences and are compared unpaired (Welch), which sees less.

    It says whether the slice tells these two networks apart, not whether other seeds of the same
    configs would come out so: `compare_seeds` does.
    """
    assert one.slice_fingerprint == other.slice_fingerprint, "reports on different text"
    a, b = np.array(one.sequence_losses), np.array(other.sequence_losses)
    if min(len(a), len(b)) < 2:
        return LossDifference(one.loss - other.loss, None, None, "one sequence, which says nothing")
    if len(a) == len(b):
        if np.ptp(a - b) == 0:  # as a model against itself: Student's t divides by zero
            mean = float(np.mean(a - b))
            return LossDifference(mean, mean, mean, f"{len(a):,} sequences, paired")
        interval = stats.ttest_rel(a, b).confidence_interval(CONFIDENCE)
        basis = f"{len(a):,} sequences, paired"
    else:
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(CONFIDENCE)
        basis = f"{len(a):,} and {len(b):,} sequences, unpaired"
    return LossDifference(one.loss - other.loss, float(interval.low), float(interval.high), basis)


def compare_seeds(one: Sequence[float], other: Sequence[float]) -> LossDifference:
    """Of the mean losses of two configs, each trained with several seeds (Welch's t)."""
    mean = float(np.mean(one) - np.mean(other))
    if min(len(one), len(other)) < 2:
        return LossDifference(mean, None, None, "one seed, which says nothing")
    basis = f"{len(one)} and {len(other)} seeds"
    if np.ptp(one) == np.ptp(other) == 0:
        return LossDifference(mean, mean, mean, basis)
    interval = stats.ttest_ind(one, other, equal_var=False).confidence_interval(CONFIDENCE)
    return LossDifference(mean, float(interval.low), float(interval.high), basis)


@dataclass(frozen=True)
class PromotionDecision:
    """Whether a challenger takes the champion's place, and why, in a sentence."""

    promoted: bool
    reason: str
    comparable: bool = True
    """False where there was nothing that the two could be held against each other by."""


def compare_with_champion(
    challenger: EvaluationReport, champion: EvaluationReport | None
) -> PromotionDecision:
    """The challenger must be better on the same slice by more than chance."""
    if champion is None:
        return PromotionDecision(True, "the first model: there was no champion")
    if challenger.slice_fingerprint != champion.slice_fingerprint:
        return PromotionDecision(
            False,
            "cannot be compared with the champion: it was evaluated on other text; evaluate both "
            "on one slice",
            comparable=False,
        )
    found = compare_reports(challenger, champion)
    losses = f"loss {challenger.loss:.4f} against the champion's {champion.loss:.4f}"
    if found.low is None or found.high is None:
        return PromotionDecision(False, f"{losses}: {found.basis}")
    interval = (
        f"95% interval of the difference {found.low:+.4f} to {found.high:+.4f}, {found.basis}"
    )
    if found.is_significantly_better:
        return PromotionDecision(True, f"better: {losses}; {interval}")
    if found.is_significant:
        return PromotionDecision(False, f"worse: {losses}; {interval}")
    return PromotionDecision(False, f"not different beyond chance: {losses}; {interval}")
