"""Several configs beside each other, and in plain words which of them is the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from gpt.artifacts import EvaluationReport
from gpt.evaluation.significance import LossDifference, compare_reports, compare_seeds


@dataclass(frozen=True)
class LossCurve:
    """Of a training run, one value a validation."""

    tokens: tuple[int, ...]
    hours: tuple[float, ...]
    """Of training alone, up to there."""
    losses: tuple[float, ...]
    """Validation loss, nats a token."""


@dataclass(frozen=True)
class RunResult:
    """What one run came to. None: not measured on this device."""

    seed: int
    parameters: int
    tokens: int
    report: EvaluationReport
    tokens_per_second: float
    """Median over the steps."""
    hours: float
    """Of training alone."""
    peak_memory_bytes: int | None
    energy_joules: float | None
    curve: LossCurve


@dataclass(frozen=True)
class ConfigResult:
    """A config with all its seeds."""

    name: str
    runs: tuple[RunResult, ...]
    failures: tuple[str, ...] = ()
    """Why a seed of it has no result, each in a line."""

    @cached_property
    def losses(self) -> list[float]:
        return [run.report.loss for run in self.runs]

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return fmean(self.losses)


def sort_by_loss(entries: Sequence[ConfigResult]) -> list[ConfigResult]:
    """Those that have a result, the lowest loss first."""
    return sorted((entry for entry in entries if entry.runs), key=lambda entry: entry.loss)


def difference_of(one: ConfigResult, other: ConfigResult) -> LossDifference:
    """Over the sequences of the slice where each has one seed, else over seeds."""
    if max(len(one.runs), len(other.runs)) > 1:
        return compare_seeds(one.losses, other.losses)
    return compare_reports(one.runs[0].report, other.runs[0].report)


def summarize_comparison(entries: Sequence[ConfigResult]) -> str:
    """Which config is the best, whether that is more than chance, and what to keep in mind."""
    ranked = sort_by_loss(entries)
    parts = [
        f"{entry.name} has no result: {entry.failures[0]}." for entry in entries if not entry.runs
    ]
    if not ranked:
        return " ".join(["No config came to an end.", *parts])
    best, *others = ranked
    if not others:
        return " ".join([f"Only {best.name} came to an end, at loss {best.loss:.4f}.", *parts])
    found = {other.name: difference_of(best, other) for other in others}
    alike = [other for other in others if not found[other.name].is_significant]
    parts = [_first_sentence(best, others, alike, found), *parts]
    if alike:
        parts.append(_choice_among([best, *alike]))
    parts += [*_other_tokens(ranked), _what_chance_was(ranked)]
    return " ".join(parts)


def _first_sentence(
    best: ConfigResult,
    others: Sequence[ConfigResult],
    alike: Sequence[ConfigResult],
    found: dict[str, LossDifference],
) -> str:
    if not alike:
        second = others[0]
        return (
            f"{best.name} is the best: its validation loss of {best.loss:.4f} is lower than that "
            f"of {_listed([o.name for o in others])} by more than chance; it leads {second.name} "
            f"by {_interval(found[second.name])}."
        )
    named = _listed([f"{o.name} (by {_interval(found[o.name])})" for o in alike])
    sentence = (
        f"{best.name} has the lowest validation loss, {best.loss:.4f}, but {named} "
        f"{'is' if len(alike) == 1 else 'are'} not different from it beyond chance"
    )
    behind = [o.name for o in others if o not in alike]
    return f"{sentence}; {_listed(behind)} {_is(behind)} worse." if behind else f"{sentence}."


def _interval(found: LossDifference) -> str:
    if found.low is None or found.high is None:
        return f"{-found.mean:.4f} nats, an interval unknown"
    return f"{-found.mean:.4f} nats, 95% interval {-found.high:.4f} to {-found.low:.4f}"


def _choice_among(alike: Sequence[ConfigResult]) -> str:
    smallest = min(alike, key=lambda entry: entry.runs[0].parameters)
    count = smallest.runs[0].parameters / 1e6
    return f"Of these {smallest.name} is the smallest, with {count:,.1f}M parameters."


def _other_tokens(ranked: Sequence[ConfigResult]) -> list[str]:
    seen = {entry.name: entry.runs[0].tokens for entry in ranked}
    if len(set(seen.values())) == 1:
        return []
    listed = _listed([f"{name} {tokens:,}" for name, tokens in seen.items()])
    return [
        f"They were trained on different numbers of tokens ({listed}), so this compares the "
        "configs as they are, not at equal tokens: --tokens N does."
    ]


def _what_chance_was(ranked: Sequence[ConfigResult]) -> str:
    if any(len(entry.runs) > 1 for entry in ranked):
        single = [entry.name for entry in ranked if len(entry.runs) == 1]
        alone = f", of which {_listed(single)} {_has(single)} one result alone" if single else ""
        return f"Chance is measured over seeds{alone}."
    return (
        "Chance is measured over the validation text, for the one seed that each was trained "
        "with; another seed may move a loss by more: --seeds 3 measures that."
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _has(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
