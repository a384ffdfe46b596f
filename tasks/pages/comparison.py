"""The page of a comparison: Markdown, and the same Markdown as HTML with charts and samples.

The HTML file opens without a network: style and charts are inside.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure

from gpt.evaluation.comparison import ConfigResult, RunResult, sort_by_loss
from gpt.hardware.gpus import GIB
from gpt.markdown import render_table

NOT_AVAILABLE = "n/a"
JOULES_PER_KWH = 3.6e6
TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class Column:
    """A column of the table: a value per run, averaged over the seeds of a config."""

    heading: str
    value: str
    """Attribute of a `RunResult`, e.g. report.loss."""
    number_format: str
    error: str = ""
    """Attribute with the standard error of a single run; several seeds give their own."""
    unit: float = 1

    def read(self, run: RunResult, path: str) -> float | None:
        value: Any = run
        for name in path.split("."):
            value = getattr(value, name, None)  # None: a benchmark that was not run
        return None if value is None else value / self.unit

    def cell(self, result: ConfigResult) -> str:
        known = [v for run in result.runs if (v := self.read(run, self.value)) is not None]
        if not known:
            return NOT_AVAILABLE
        text = format(fmean(known), self.number_format)
        if not self.error:
            return text
        single = self.read(result.runs[0], self.error)
        error = stdev(known) / len(known) ** 0.5 if len(known) > 1 else single
        return text if error is None else f"{text} ± {error:{self.number_format}}"


SWAG = "report.hellaswag.normalized_accuracy"
COLUMNS = (
    Column("parameters", "parameters", ",.0f"),
    Column("tokens", "tokens", ",.0f"),
    Column("validation loss", "report.loss", ".4f", error="report.standard_error"),
    Column("bits per byte", "report.bits_per_byte", ".4f"),
    Column("HellaSwag", SWAG, ".4f", error=f"{SWAG}_error"),
    Column("LAMBADA", "report.lambada.accuracy", ".4f", error="report.lambada.accuracy_error"),
    Column("LAMBADA perplexity", "report.lambada.perplexity", ",.2f"),
    Column("tokens/s", "tokens_per_second", ",.0f"),
    Column("hours", "hours", ",.2f"),
    Column("peak memory, GiB", "peak_memory_bytes", ",.2f", unit=GIB),
    Column("energy, kWh", "energy_joules", ",.3f", unit=JOULES_PER_KWH),
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


def draw_charts(results: Sequence[ConfigResult]) -> dict[str, str]:
    """Draw the charts as SVG, by file name; none if no config has a result."""
    finished = [result for result in results if result.runs]
    if not finished:
        return {}
    names = ("loss-by-tokens", "loss-by-hours", "loss-by-parameters", "throughput")
    figures = [Figure(figsize=(6, 4), layout="constrained") for _ in names]
    by_tokens, by_hours, by_size, throughput = (figure.subplots() for figure in figures)
    for number, result in enumerate(finished):
        for run in result.runs:
            tokens, hours, losses = np.array(run.curve).reshape(-1, 3).T
            label = result.name if run is result.runs[0] else None
            by_tokens.plot(tokens / 1e6, losses, f"C{number}.-", label=label)
            by_hours.plot(hours, losses, f"C{number}.-", label=label)
        errors = [run.report.standard_error or 0.0 for run in result.runs]
        counts = [run.parameters / 1e6 for run in result.runs]
        style: dict[str, Any] = {"fmt": f"C{number}o", "capsize": 3, "label": result.name}
        by_size.errorbar(counts, result.losses, yerr=errors, **style)
    by_tokens.set_xlabel("tokens, millions")
    by_hours.set_xlabel("training time, hours")
    by_size.set_xlabel("parameters, millions")
    for axes in (by_tokens, by_hours, by_size):
        axes.set_ylabel("validation loss, nats per token")
        axes.legend()
    rates = [fmean(run.tokens_per_second for run in result.runs) for result in finished]
    colors = [f"C{number}" for number in range(len(finished))]
    bars = throughput.barh([result.name for result in finished], rates, color=colors)
    throughput.bar_label(bars, fmt="{:,.0f}", padding=3)
    throughput.set(xlabel="tokens/s", xmargin=0.15)
    throughput.invert_yaxis()
    return {name: _to_svg(figure) for name, figure in zip(names, figures, strict=True)}


def _to_svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    file = io.StringIO()
    # Text stays text, so that it can be searched; the same results give the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "overnight"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()[file.getvalue().index("<svg") :]
