"""Compare: read the result of each run from its folder and write one page about all of them."""

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import Artifact
from gpt.config.schema import RunConfig
from gpt.evaluation.comparison import ConfigResult, RunResult, summarize_comparison
from gpt.evaluation.report_store import load_report
from gpt.files import write_text
from gpt.preflight.parameters import count_parameters
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.run_dir import RUN_FILE
from tasks.pages.comparison import draw_charts, render_html, render_markdown
from tasks.runtime.prefect_api import publish_markdown
from tasks.tracking import journal
from tasks.tracking.runs import RunRef, attach_artifacts

HTML_FILE = "comparison.html"
MARKDOWN_FILE = "comparison.md"


class VariantResult(Artifact):
    """One config with one seed: the folder of its finished run, or why there is none."""

    name: str
    folder: Path | None
    failure: str = ""


class Comparison(Artifact):
    verdict: str
    """Which config is best, in plain words."""
    page: Path
    """Self-contained HTML."""
    markdown: str


@task(name="compare", task_run_name="compare", cache_policy=NO_CACHE)
def compare(run: RunRef, results: tuple[VariantResult, ...]) -> Comparison:
    """Write the page of a comparison and publish it in MLflow and Prefect."""
    name = run.folder.name.rpartition("-")[0]
    configs = group_by_config(results)
    verdict, charts = summarize_comparison(configs), draw_charts(configs)
    markdown = render_markdown(name, configs, verdict)
    texts = {
        HTML_FILE: render_html(name, configs, markdown, charts),
        MARKDOWN_FILE: markdown,
        **{f"{chart}.svg": svg for chart, svg in charts.items()},
    }
    for file, text in texts.items():
        write_text(run.folder / file, text)
    attach_artifacts(run, {file: run.folder / file for file in texts}, note=markdown)
    publish_markdown(f"comparison-{name}", markdown, verdict)
    return Comparison(verdict=verdict, page=(run.folder / HTML_FILE).resolve(), markdown=markdown)


def group_by_config(results: Sequence[VariantResult]) -> list[ConfigResult]:
    """Load the result of every run, grouped by config, in the order of the first seeds."""
    names = dict.fromkeys(result.name for result in results)
    return [
        ConfigResult(
            name=name,
            runs=tuple(load_run_result(r.folder) for r in results if r.name == name and r.folder),
            failures=tuple(r.failure for r in results if r.name == name and not r.folder),
        )
        for name in names
    ]


def load_run_result(folder: Path) -> RunResult:
    """Load the result of a finished and evaluated run from its folder."""
    raw = json.loads((folder / RUN_FILE).read_bytes())["config"]
    config = RunConfig.model_validate_json(json.dumps(raw))
    checkpoint = latest_checkpoint(folder)
    assert checkpoint, f"{folder} has no checkpoint"
    report = load_report(folder, config, checkpoint.step)
    assert report, f"{folder} is not evaluated"
    lines, _ = journal.read_metrics(folder / journal.METRICS_FILE)

    def by_step(key: str) -> dict[int, float]:
        found = {line.step: line.metrics[key] for line in lines if key in line.metrics}
        return dict(sorted(found.items()))

    throughputs, energy = by_step("tokens_per_second"), by_step("energy_joules")
    seconds = accumulate(config.tokens_per_step / value for value in throughputs.values())
    hours = {0: 0.0} | {step: s / 3600 for step, s in zip(throughputs, seconds, strict=True)}
    return RunResult(
        parameters=count_parameters(config.model).total,
        tokens=checkpoint.tokens_seen,
        report=report,
        tokens_per_second=median(throughputs.values()),
        hours=max(hours.values()),
        peak_memory_bytes=int(max(by_step("memory/peak_bytes").values(), default=0)) or None,
        energy_joules=sum(energy.values()) if energy else None,
        curve=tuple(
            (step * config.tokens_per_step, hours[step], loss)
            for step, loss in by_step("val/loss").items()
            if step in hours
        ),
    )
