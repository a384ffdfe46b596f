"""Stage 1, validate-config: a config that cannot work fails before anything else starts."""

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.config.schema import RunConfig
from gpt.errors import ConfigError
from gpt.evaluation.report import check_benchmarks
from gpt.preflight.render import render_markdown, summarize_report
from gpt.preflight.report import run_preflight
from tasks.display import log_warning
from tasks.runtime.prefect_api import publish_markdown


@task(name="validate-config", task_run_name="validate-config", cache_policy=NO_CACHE)
def validate_config(path: str, overrides: dict[str, Any]) -> RunConfig:
    """Run the preflight, publish its report as an artifact and log its warnings.

    Raises `ConfigError` with every problem found, and `BenchmarkError` for a benchmark file that
    cannot be scored. The dataset is not read.
    """
    report = run_preflight(path, overrides, starting=True)
    name = report.figures.config.run.name if report.figures else report.path
    publish_markdown(f"preflight-{name}", render_markdown(report), summarize_report(report))
    for warning in report.warnings:
        log_warning(f"{warning.subject}: {warning.rule}; {warning.remedy}")
    if report.figures is None or report.problems:
        raise ConfigError(*report.problems)
    check_benchmarks(report.figures.config)
    return report.figures.config
