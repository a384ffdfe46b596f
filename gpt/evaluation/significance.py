"""Whether two models differ: their losses on the same text, with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt.artifacts import EvaluationReport

CONFIDENCE = 0.95


@dataclass(frozen=True)
class LossDifference:
    """First mean loss minus second, nats per token; negative: the first model is better."""

    mean: float
    low: float | None
    high: float | None
    """Ends of the 95% confidence interval; None if there are too few values for one."""
    basis: str
    """What the interval was computed over."""

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and self.low * self.high > 0

    @property
    def is_significantly_better(self) -> bool:
        """Whether the first model is significantly better."""
        return self.is_significant and self.mean < 0

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return self.basis
        return f"95% interval of the difference {self.low:+.4f} to {self.high:+.4f}, {self.basis}"


def compare_reports(one: EvaluationReport, other: EvaluationReport) -> LossDifference:
    """Compare two models on the same slice, paired by sequence.

    Pairing removes the difficulty of each text, which is the same for both (Student's t; Miller
    2024, "Adding Error Bars to Evals", arXiv:2411.00640). Models of different block sizes have
    different sequences and are compared unpaired (Welch's t), which is less sensitive.

    The result holds for these two networks, not for other seeds of the same configs; for those, see
    `compare_seeds`.
    """
    assert one.slice_fingerprint == other.slice_fingerprint, "reports on different text"
    a, b = np.array(one.sequence_losses), np.array(other.sequence_losses)
    return _compare(one.loss - other.loss, a, b, "sequence", paired=len(a) == len(b))


def compare_seeds(one: Sequence[float], other: Sequence[float]) -> LossDifference:
    """Compare the losses of two configs that were trained with several seeds each (Welch's t)."""
    a, b = np.array(one), np.array(other)
    return _compare(float(a.mean() - b.mean()), a, b, "seed", paired=False)


def _compare(mean: float, a: np.ndarray, b: np.ndarray, unit: str, paired: bool) -> LossDifference:
    if min(len(a), len(b)) < 2:
        return LossDifference(mean, None, None, f"no interval: there is only one {unit}")
    counts = f"{len(a):,} paired" if paired else f"{len(a):,} and {len(b):,} unpaired"
    basis = f"{counts} {unit}s"
    spread = np.ptp(a - b) if paired else max(np.ptp(a), np.ptp(b))
    if spread == 0:  # e.g. a model and itself; the t statistic would divide by zero
        mean = float(np.mean(a - b) if paired else np.mean(a) - np.mean(b))
        return LossDifference(mean, mean, mean, basis)
    from scipy import stats  # the import takes a second

    test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(CONFIDENCE)
    return LossDifference(mean, float(interval.low), float(interval.high), basis)


@dataclass(frozen=True)
class PromotionDecision:
    """Whether a challenger becomes the champion, and why."""

    promoted: bool
    reason: str
    comparable: bool = True
    """False if the champion has not been evaluated on the same text."""


def compare_with_champion(
    challenger: EvaluationReport, champion: EvaluationReport | None
) -> PromotionDecision:
    """Promote the challenger if it is significantly better on the same slice."""
    if champion is None:
        return PromotionDecision(True, "the first model: there was no champion")
    if challenger.slice_fingerprint != champion.slice_fingerprint:
        reason = (
            "cannot be compared with the champion, which was evaluated on other text; evaluate "
            "both on the same slice"
        )
        return PromotionDecision(False, reason, comparable=False)
    found = compare_reports(challenger, champion)
    if found.is_significantly_better:
        result = "better"
    else:
        result = "worse" if found.is_significant else "no significant difference"
    losses = f"loss {challenger.loss:.4f}, champion {champion.loss:.4f}"
    reason = f"{result}: {losses}; {found.interval}"
    return PromotionDecision(found.is_significantly_better, reason)
