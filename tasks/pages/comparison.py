"""The page of a comparison: Markdown, and the same Markdown as HTML with charts and samples.

The HTML file opens without a network: style and charts are inside.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import jinja2
import matplotlib as mpl
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt.evaluation.comparison import ConfigResult, RunResult, sort_by_loss
from gpt.hardware.gpus import GIB
from gpt.markdown import render_table

NOT_AVAILABLE = "n/a"
JOULES_PER_KWH = 3.6e6
TEMPLATE = Path(__file__).with_suffix(".html")
Value = Callable[[RunResult], float | None]


@dataclass(frozen=True)
class Column:
    """A column of the table: a value per run, averaged over the seeds of a config."""

    heading: str
    value: Value
    number_format: str
    error: Value | None = None
    """Standard error of a single run; several seeds give their own."""

    def cell(self, result: ConfigResult) -> str:
        known = [value for run in result.runs if (value := self.value(run)) is not None]
        if not known:
            return NOT_AVAILABLE
        text = format(fmean(known), self.number_format)
        if self.error is None:
            return text
        error = stdev(known) / len(known) ** 0.5 if len(known) > 1 else self.error(result.runs[0])
        return text if error is None else f"{text} ± {error:{self.number_format}}"


def _benchmark(name: str, field: str) -> Value:
    """A value of a benchmark's result; None if the benchmark was not run."""
    return lambda run: getattr(getattr(run.report, name), field, None)


COLUMNS = (
    Column("parameters", lambda run: run.parameters, ",.0f"),
    Column("tokens", lambda run: run.tokens, ",.0f"),
    Column(
        "validation loss",
        lambda run: run.report.loss,
        ".4f",
        error=lambda run: run.report.standard_error,
    ),
    Column("bits per byte", lambda run: run.report.bits_per_byte, ".4f"),
    Column(
        "HellaSwag",
        _benchmark("hellaswag", "normalized_accuracy"),
        ".4f",
        error=_benchmark("hellaswag", "normalized_accuracy_error"),
    ),
    Column(
        "LAMBADA",
        _benchmark("lambada", "accuracy"),
        ".4f",
        error=_benchmark("lambada", "accuracy_error"),
    ),
    Column("LAMBADA perplexity", _benchmark("lambada", "perplexity"), ",.2f"),
    Column("tokens/s", lambda run: run.tokens_per_second, ",.0f"),
    Column("hours", lambda run: run.hours, ",.2f"),
    Column(
        "peak memory, GiB",
        lambda run: run.peak_memory_bytes and run.peak_memory_bytes / GIB,
        ",.2f",
    ),
    Column(
        "energy, kWh", lambda run: run.energy_joules and run.energy_joules / JOULES_PER_KWH, ",.3f"
    ),
)
HEADINGS = ("config", *(column.heading for column in COLUMNS))


def render_markdown(name: str, results: Sequence[ConfigResult], summary: str) -> str:
    """Render the summary, the table with the best config first, and the failures."""
    rows = [[r.name, *(column.cell(r) for column in COLUMNS)] for r in sort_by_loss(results)]
    over = "seeds" if any(len(r.runs) > 1 for r in results) else "sequences and examples"
    legend = (
        f"± is one standard error over {over}. HellaSwag is the length-normalized accuracy, "
        "LAMBADA the accuracy of the last word. Hours are training time, without evaluations. "
        f"{NOT_AVAILABLE}: the benchmark is not configured, or the device does not measure it."
    )
    failures = [
        f"- **{r.name}**: {' '.join(failure.split())}" for r in results for failure in r.failures
    ]
    parts = [f"# {name}", summary, *([render_table(rows, HEADINGS), legend] if rows else [])]
    if failures:
        parts += ["## Configs without a result", "\n".join(failures)]
    return "\n\n".join(parts) + "\n"


def render_html(
    name: str, results: Sequence[ConfigResult], markdown: str, charts: dict[str, str]
) -> str:
    """Render the Markdown page as HTML, with charts and samples; model output is escaped."""
    ranked = sort_by_loss(results)
    texts = [{s.prompt: s.text for s in result.runs[0].report.samples} for result in ranked]
    prompts = dict.fromkeys(prompt for by_prompt in texts for prompt in by_prompt)
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=name,
        body=Markup(parser.render(markdown)),
        charts=[Markup(svg) for svg in charts.values()],
        names=[result.name for result in ranked],
        samples=[(prompt, [by.get(prompt, "") for by in texts]) for prompt in prompts],
    )


# --- charts --------------------------------------------------------------------------------------


def draw_charts(results: Sequence[ConfigResult]) -> dict[str, str]:
    """Draw the charts as SVG, by file name; none if no config has a result."""
    finished = [result for result in results if result.runs]
    if not finished:
        return {}
    charts: dict[str, Callable[[Axes, Sequence[ConfigResult]], None]] = {
        "loss-by-tokens": partial(
            _draw_curves,
            x=lambda run: [tokens / 1e6 for tokens in run.curve.tokens],
            label="tokens, millions",
        ),
        "loss-by-hours": partial(
            _draw_curves, x=lambda run: run.curve.hours, label="training time, hours"
        ),
        "loss-by-parameters": _draw_loss_by_parameters,
        "throughput": _draw_throughput,
    }
    return {name: _to_svg(finished, draw) for name, draw in charts.items()}


def _to_svg(
    results: Sequence[ConfigResult], draw: Callable[[Axes, Sequence[ConfigResult]], None]
) -> str:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    draw(axes, results)
    file = io.StringIO()
    # Text stays text, so that it can be searched; the same results give the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "overnight"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :]


def _draw_curves(
    axes: Axes,
    results: Sequence[ConfigResult],
    x: Callable[[RunResult], Sequence[float]],
    label: str,
) -> None:
    for number, result in enumerate(results):
        for run in result.runs:
            name = result.name if run is result.runs[0] else None
            axes.plot(x(run), run.curve.losses, f"C{number}.-", label=name, lw=1.5)
    axes.set(xlabel=label, ylabel="validation loss, nats per token")
    axes.legend()


def _draw_loss_by_parameters(axes: Axes, results: Sequence[ConfigResult]) -> None:
    for number, result in enumerate(results):
        errors = [run.report.standard_error or 0.0 for run in result.runs]
        counts = [run.parameters / 1e6 for run in result.runs]
        style: dict[str, Any] = {"color": f"C{number}", "fmt": "o", "capsize": 3}
        axes.errorbar(counts, result.losses, yerr=errors, label=result.name, **style)
    axes.set(xlabel="parameters, millions", ylabel="validation loss, nats per token")
    axes.legend()


def _draw_throughput(axes: Axes, results: Sequence[ConfigResult]) -> None:
    names = [result.name for result in results]
    throughputs = [fmean(run.tokens_per_second for run in result.runs) for result in results]
    bars = axes.barh(names, throughputs, color=[f"C{number}" for number in range(len(results))])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set(xlabel="tokens/s")
