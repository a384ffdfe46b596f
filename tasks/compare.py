"""The last stage of a comparison: what each run came to, read from its folder, on one page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import Artifact
from gpt.config.schema import RunConfig
from gpt.evaluation.comparison import ConfigResult, LossCurve, RunResult, summarize_comparison
from gpt.evaluation.report_store import load_report
from gpt.files import write_text
from gpt.preflight.parameters import count_parameters
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.run_dir import RUN_FILE
from tasks.pages.comparison import html_page, markdown_page, pictures
from tasks.runtime.prefect_api import publish_markdown
from tasks.tracking import journal
from tasks.tracking.runs import RunRef, attach_artifacts, set_run_note

PAGE = "comparison.html"
MARKDOWN = "comparison.md"


class VariantResult(Artifact):
    """One config with one seed: the folder of its finished run, or why there is none."""

    name: str
    seed: int
    folder: Path | None
    failure: str = ""


class Comparison(Artifact):
    verdict: str
    page: Path
    """Self-contained HTML."""
    markdown: str


@task(name="compare", task_run_name="compare", cache_policy=NO_CACHE)
def compare(run: RunRef, results: tuple[VariantResult, ...]) -> Comparison:
    """Write the page of the comparison, and give it to MLflow and Prefect."""
    name = run.folder.name.rpartition("-")[0]
    entries = entries_of(results)
    found, drawn = summarize_comparison(entries), pictures(entries)
    markdown = markdown_page(name, entries, found)
    page, written = run.folder / PAGE, run.folder / MARKDOWN
    write_text(page, html_page(name, entries, found, drawn))
    write_text(written, markdown)
    for picture, svg in drawn.items():
        write_text(run.folder / f"{picture}.svg", svg)
    files = [page, written, *(run.folder / f"{picture}.svg" for picture in drawn)]
    attach_artifacts(run, {path.name: path for path in files})
    set_run_note(run, markdown)
    publish_markdown(f"comparison-{name}", markdown, found)
    return Comparison(verdict=found, page=page.resolve(), markdown=markdown)


def entries_of(results: Sequence[VariantResult]) -> list[ConfigResult]:
    """One for each name, in their order."""
    names = dict.fromkeys(contestant.name for contestant in results)
    return [
        ConfigResult(
            name=name,
            runs=tuple(trained(c.folder) for c in results if c.name == name and c.folder),
            failures=tuple(c.failure for c in results if c.name == name and not c.folder),
        )
        for name in names
    ]


def trained(folder: Path) -> RunResult:
    """What a finished and evaluated run came to, from its folder."""
    raw = json.loads((folder / RUN_FILE).read_bytes())["config"]
    config = RunConfig.model_validate_json(json.dumps(raw))
    checkpoint = latest_checkpoint(folder)
    assert checkpoint, f"{folder} has no checkpoint"
    report = load_report(folder, config, checkpoint.step)
    assert report, f"{folder} is not evaluated"
    lines, _ = journal.read_metrics(folder / journal.METRICS_FILE)
    paces = _values(lines, "tokens_per_second")
    energy = _values(lines, "energy_joules")
    return RunResult(
        seed=config.training.seed,
        parameters=count_parameters(config.model).total,
        tokens=checkpoint.tokens_seen,
        report=report,
        tokens_per_second=median(paces.values()),
        hours=sum(config.tokens_per_step / pace for pace in paces.values()) / 3600,
        peak_memory_bytes=_largest(_values(lines, "memory/peak_bytes").values()),
        energy_joules=sum(energy.values()) if energy else None,
        curve=_curve(lines, paces, config.tokens_per_step),
    )


def _values(lines: Iterable[journal.MetricsLine], key: str) -> dict[int, float]:
    """By step, in the order of steps; the journal holds each once."""
    found = {line.step: line.metrics[key] for line in lines if key in line.metrics}
    return dict(sorted(found.items()))


def _largest(values: Iterable[float]) -> int | None:
    return int(max(values, default=0)) or None


def _curve(
    lines: Sequence[journal.MetricsLine], paces: dict[int, float], tokens_per_step: int
) -> LossCurve:
    seconds = accumulate(tokens_per_step / pace for pace in paces.values())
    hours = {0: 0.0} | {step: s / 3600 for step, s in zip(paces, seconds, strict=True)}
    losses = {step: loss for step, loss in _values(lines, "val/loss").items() if step in hours}
    return LossCurve(
        tokens=tuple(step * tokens_per_step for step in losses),
        hours=tuple(hours[step] for step in losses),
        losses=tuple(losses.values()),
    )
