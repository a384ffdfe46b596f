"""Results of several configs, and a summary in plain words of which one is best."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from gpt.artifacts import EvaluationReport
from gpt.evaluation.significance import LossDifference, compare_reports, compare_seeds


@dataclass(frozen=True)
class RunResult:
    """The result of one run. None: not measured on this device."""

    parameters: int
    tokens: int
    report: EvaluationReport
    tokens_per_second: float
    """Median over the steps."""
    hours: float
    """Training time, without evaluations."""
    peak_memory_bytes: int | None
    energy_joules: float | None
    curve: tuple[tuple[int, float, float], ...]
    """Validation losses during training: tokens, hours as above, and nats per token."""


@dataclass(frozen=True)
class ConfigResult:
    """The results of a config with all its seeds."""

    name: str
    runs: tuple[RunResult, ...]
    failures: tuple[str, ...] = ()
    """Why seeds have no result, one message each."""

    @property
    def losses(self) -> list[float]:
        return [run.report.loss for run in self.runs]

    @property
    def loss(self) -> float:
        """Mean over the seeds, nats per token."""
        return fmean(self.losses)


def sort_by_loss(results: Sequence[ConfigResult]) -> list[ConfigResult]:
    """Return the configs that have a result, lowest loss first."""
    return sorted((result for result in results if result.runs), key=lambda result: result.loss)


def compare_results(one: ConfigResult, other: ConfigResult) -> LossDifference:
    """Compare over the sequences of the slice if each config has one seed, else over seeds."""
    if max(len(one.runs), len(other.runs)) > 1:
        return compare_seeds(one.losses, other.losses)
    return compare_reports(one.runs[0].report, other.runs[0].report)


def summarize_comparison(results: Sequence[ConfigResult]) -> str:
    """Say which config is best, whether significantly, and what limits the comparison."""
    ranked = sort_by_loss(results)
    failed = [
        f"{r.name} has no result: {' '.join(r.failures[0].split())}." for r in results if not r.runs
    ]
    if not ranked:
        return " ".join(["No config finished.", *failed])
    best, *others = ranked
    if not others:
        return " ".join([f"Only {best.name} finished, with loss {best.loss:.4f}.", *failed])
    sentences = [_describe_best(best, others), *failed]
    tokens = {result.name: result.runs[0].tokens for result in ranked}
    if len(set(tokens.values())) > 1:
        listed = _join([f"{name} {count:,}" for name, count in tokens.items()])
        sentences.append(
            f"The configs were trained on different numbers of tokens ({listed}); use --tokens N "
            "to compare them at equal tokens."
        )
    return " ".join([*sentences, _describe_basis(ranked)])


def _describe_best(best: ConfigResult, others: Sequence[ConfigResult]) -> str:
    differences = {other.name: compare_results(other, best) for other in others}
    worse = [other.name for other in others if differences[other.name].is_significant]
    similar = [other for other in others if other.name not in worse]
    lead = f"{best.name} has the lowest validation loss, {best.loss:.4f}"
    if not similar:
        second = others[0].name
        return (
            f"{lead}, significantly lower than {_join(worse)}; its lead over {second} is "
            f"{_format_lead(differences[second])}."
        )
    named = [f"{other.name} ({_format_lead(differences[other.name])})" for other in similar]
    sentence = f"{lead}, but not significantly lower than {_join(named)}"
    if worse:
        sentence += f"; {_join(worse)} {'is' if len(worse) == 1 else 'are'} significantly worse"
    smallest = min([best, *similar], key=lambda result: result.runs[0].parameters)
    count = smallest.runs[0].parameters / 1e6
    return (
        f"{sentence}. Of {_join([best.name, *(other.name for other in similar)])}, "
        f"{smallest.name} is the smallest, with {count:,.1f}M parameters."
    )


def _format_lead(difference: LossDifference) -> str:
    if difference.low is None or difference.high is None:
        return f"{difference.mean:.4f} nats per token, interval unknown"
    return (
        f"{difference.mean:.4f} nats per token, 95% interval {difference.low:.4f} to "
        f"{difference.high:.4f}"
    )


def _describe_basis(ranked: Sequence[ConfigResult]) -> str:
    if any(len(result.runs) > 1 for result in ranked):
        single = [result.name for result in ranked if len(result.runs) == 1]
        note = f" ({_join(single)}: only one result)" if single else ""
        return f"Significance is computed over seeds{note}."
    return (
        "Significance is computed over the validation text, with one seed per config; another seed "
        "may change a loss by more, which --seeds 3 measures."
    )


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
