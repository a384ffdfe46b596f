"""The page of a comparison: as Markdown, and as HTML that opens without a network."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt.evaluation.comparison import ConfigResult, RunResult, sort_by_loss
from gpt.hardware.gpus import GIB

NOTHING = "n/a"
JOULES_A_KWH = 3.6e6
TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class Column:
    heading: str
    value: Callable[[ConfigResult], str]


def _mean(entry: ConfigResult, value: Callable[[RunResult], float | None]) -> float | None:
    """Over the seeds that have it."""
    known = [found for run in entry.runs if (found := value(run)) is not None]
    return fmean(known) if known else None


def _shown(value: Callable[[RunResult], float | None], form: str) -> Callable[[ConfigResult], str]:
    def cell(entry: ConfigResult) -> str:
        mean = _mean(entry, value)
        return NOTHING if mean is None else format(mean, form)

    return cell


def _with_error(
    value: Callable[[RunResult], float | None],
    error: Callable[[RunResult], float | None],
    form: str,
) -> Callable[[ConfigResult], str]:
    """± one standard error: over the seeds where there are several, else over the examples."""

    def cell(entry: ConfigResult) -> str:
        known = [found for run in entry.runs if (found := value(run)) is not None]
        if not known:
            return NOTHING
        spread = stdev(known) / len(known) ** 0.5 if len(known) > 1 else error(entry.runs[0])
        return format(fmean(known), form) + ("" if spread is None else f" ± {spread:{form}}")

    return cell


def _gib(run: RunResult) -> float | None:
    return run.peak_memory_bytes and run.peak_memory_bytes / GIB


def _score(benchmark: str, name: str) -> Callable[[RunResult], float | None]:
    """A number of a benchmark's result, where it was run."""
    return lambda run: getattr(getattr(run.report, benchmark), name, None)


def _kwh(run: RunResult) -> float | None:
    return run.energy_joules and run.energy_joules / JOULES_A_KWH


COLUMNS = (
    Column("config", lambda entry: entry.name),
    Column("parameters", _shown(lambda run: run.parameters, ",.0f")),
    Column("tokens", _shown(lambda run: run.tokens, ",.0f")),
    Column(
        "validation loss",
        _with_error(lambda run: run.report.loss, lambda run: run.report.standard_error, ".4f"),
    ),
    Column("bits per byte", _shown(lambda run: run.report.bits_per_byte, ".4f")),
    Column(
        "HellaSwag",
        _with_error(
            _score("hellaswag", "normalized_accuracy"),
            _score("hellaswag", "normalized_accuracy_error"),
            ".4f",
        ),
    ),
    Column(
        "LAMBADA",
        _with_error(
            _score("lambada", "accuracy"),
            _score("lambada", "accuracy_error"),
            ".4f",
        ),
    ),
    Column(
        "LAMBADA perplexity",
        _shown(_score("lambada", "perplexity"), ",.2f"),
    ),
    Column("tokens/s", _shown(lambda run: run.tokens_per_second, ",.0f")),
    Column("hours", _shown(lambda run: run.hours, ",.2f")),
    Column("peak memory, GiB", _shown(_gib, ",.2f")),
    Column("energy, kWh", _shown(_kwh, ",.3f")),
)


def rows(entries: Sequence[ConfigResult]) -> list[list[str]]:
    """One for each config that has a result, the lowest loss first."""
    return [[column.value(entry) for column in COLUMNS] for entry in sort_by_loss(entries)]


def legend(entries: Sequence[ConfigResult]) -> str:
    """What the signs in the table mean."""
    several = any(len(entry.runs) > 1 for entry in entries)
    over = "seeds" if several else "sequences and examples"
    return (
        f"± is one standard error over {over}. HellaSwag is the length-normalised accuracy, "
        "LAMBADA the accuracy of the last word. Hours are of training alone. "
        f"{NOTHING}: no file of the benchmark was named, or the device does not tell."
    )


# --- Markdown ------------------------------------------------------------------------------------


def markdown_page(name: str, entries: Sequence[ConfigResult], verdict: str) -> str:
    headings = [column.heading for column in COLUMNS]
    lines = [headings, ["---"] * len(headings), *rows(entries)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    failures = [f"- **{e.name}**: {failure}" for e in entries for failure in e.failures]
    parts = [f"# {name}", verdict, table, legend(entries)]
    if failures:
        parts += ["## Without a result", "\n".join(failures)]
    return "\n\n".join(parts) + "\n"


# --- pictures ------------------------------------------------------------------------------------


def pictures(entries: Sequence[ConfigResult]) -> dict[str, str]:
    """SVG by name; none where nothing has a result."""
    ranked = [entry for entry in entries if entry.runs]
    if not ranked:
        return {}
    return {
        "loss-by-tokens": _drawn(ranked, _loss_by_tokens),
        "loss-by-hours": _drawn(ranked, _loss_by_hours),
        "loss-by-parameters": _drawn(ranked, _loss_by_parameters),
        "throughput": _drawn(ranked, _throughput),
    }


def _drawn(
    entries: Sequence[ConfigResult], draw: Callable[[Axes, Sequence[ConfigResult]], None]
) -> str:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    draw(axes, entries)
    file = io.StringIO()
    # Text stays text, so that it can be read and found; the same page is the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "overnight"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def _loss_by_tokens(axes: Axes, entries: Sequence[ConfigResult]) -> None:
    _curves(axes, entries, lambda run: [tokens / 1e6 for tokens in run.curve.tokens])
    axes.set(xlabel="tokens, millions")


def _loss_by_hours(axes: Axes, entries: Sequence[ConfigResult]) -> None:
    _curves(axes, entries, lambda run: run.curve.hours)
    axes.set(xlabel="hours of training")


def _curves(
    axes: Axes, entries: Sequence[ConfigResult], across: Callable[[RunResult], Sequence[float]]
) -> None:
    for number, entry in enumerate(entries):
        for run in entry.runs:
            label = entry.name if run is entry.runs[0] else None
            look: dict[str, Any] = {"color": f"C{number}", "label": label, "marker": ".", "lw": 1.5}
            axes.plot(across(run), run.curve.losses, **look)
    axes.set(ylabel="validation loss, nats a token")
    axes.legend()


def _loss_by_parameters(axes: Axes, entries: Sequence[ConfigResult]) -> None:
    for number, entry in enumerate(entries):
        errors = [run.report.standard_error or 0.0 for run in entry.runs]
        counts = [run.parameters / 1e6 for run in entry.runs]
        look: dict[str, Any] = {"color": f"C{number}", "fmt": "o", "capsize": 3}
        axes.errorbar(counts, entry.losses, yerr=errors, label=entry.name, **look)
    axes.set(xlabel="parameters, millions", ylabel="validation loss, nats a token")
    axes.legend()


def _throughput(axes: Axes, entries: Sequence[ConfigResult]) -> None:
    names = [entry.name for entry in entries]
    paces = [_mean(entry, lambda run: run.tokens_per_second) or 0.0 for entry in entries]
    bars = axes.barh(names, paces, color=[f"C{number}" for number in range(len(entries))])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set(xlabel="tokens/s")


# --- HTML ----------------------------------------------------------------------------------------


def html_page(
    name: str, entries: Sequence[ConfigResult], verdict: str, drawn: dict[str, str]
) -> str:
    """With style and pictures inside; whatever a model wrote is escaped."""
    ranked = sort_by_loss(entries)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        name=name,
        verdict=verdict,
        headings=[column.heading for column in COLUMNS],
        rows=rows(entries),
        legend=legend(entries),
        pictures=[Markup(svg) for svg in drawn.values()],
        failures=[(entry.name, failure) for entry in entries for failure in entry.failures],
        names=[entry.name for entry in ranked],
        samples=_samples(ranked),
    )


def _samples(ranked: Sequence[ConfigResult]) -> list[tuple[str, list[str]]]:
    """Each prompt with what every config wrote after it, "" where it was not asked."""
    written = [{s.prompt: s.text for s in entry.runs[0].report.samples} for entry in ranked]
    prompts = dict.fromkeys(prompt for texts in written for prompt in texts)
    return [(prompt, [texts.get(prompt, "") for texts in written]) for prompt in prompts]
