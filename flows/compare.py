"""Several configs on one data set, one after the other, and a page that says which is best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.runtime.flow_run import STATE_HOOKS, call_task, cancelled_on_signal
from flows.runtime.outcome import find_finished_outcome, locate_mlflow_ui, locate_prefect_ui
from flows.runtime.variant_launcher import train_in_subprocess
from flows.runtime.variants import Variant, comparison_folder, expand_variants
from gpt.artifacts import Artifact
from gpt.errors import ComparisonError, Problem
from gpt.training.run_lock import run_lock
from tasks.compare import VariantResult
from tasks.compare import compare as compare_runs
from tasks.display import log_info
from tasks.tokenize_parquet import tokenize_parquet
from tasks.tracking.runs import open_comparison, set_parent_run, track_run_status


class ComparisonResult(Artifact):
    """What a comparison came to."""

    name: str
    verdict: str
    markdown: str
    page: Path
    failed: tuple[str, ...]
    """Configs, or seeds of them, without a result."""
    mlflow_uri: str
    mlflow_run_id: str | None
    prefect_ui: str
    mlflow_ui: str

    def __str__(self) -> str:
        return self.verdict


def _flow_run_name() -> str:
    parameters = flow_run.get_parameters()
    return str(parameters["name"] or " ".join(Path(path).stem for path in parameters["configs"]))


@flow(name="compare", flow_run_name=_flow_run_name, **STATE_HOOKS)
@cancelled_on_signal
def compare(
    configs: list[str],
    overrides: dict[str, Any] | None = None,
    tokens: int | None = None,
    seeds: int = 1,
    name: str = "",
) -> ComparisonResult:
    """Train several configs on the same data, one after the other, and compare them.

    What is finished is not done again; a config that fails is left out of the comparison.

    Args:
        configs: Paths of TOML configs.
        overrides: Values laid over each of them, key by key: {"training": {"grad_acc": 8}}.
        tokens: Train each on so many tokens, in place of its own max_steps.
        seeds: Train each so many times, with seeds counted up from its own.
        name: Of the comparison; left out: the configs' names.
    """
    variants = expand_variants(configs, overrides or {}, tokens, seeds)
    shared = next(variant.config for variant in variants if variant.config)
    dataset = call_task(tokenize_parquet)(shared)
    folder = comparison_folder(shared.run.root, variants, name)
    with run_lock(folder):
        run = open_comparison(shared, dataset, folder, _compared(variants, tokens, seeds))
        with track_run_status(run):
            results = tuple(_contestant(variant, folder) for variant in variants)
            comparison = call_task(compare_runs)(run, results)
            _refuse_nothing(results)
    return ComparisonResult(
        name=folder.name.rpartition("-")[0],
        verdict=comparison.verdict,
        markdown=comparison.markdown,
        page=comparison.page,
        failed=tuple(f"{c.name}: {c.failure}" for c in results if c.folder is None),
        mlflow_uri=run.uri,
        mlflow_run_id=run.run_id,
        prefect_ui=locate_prefect_ui(shared),
        mlflow_ui=locate_mlflow_ui(run.uri, folder),
    )


def _compared(variants: Sequence[Variant], tokens: int | None, seeds: int) -> dict[str, str]:
    """Parameters of the MLflow run above those compared."""
    names = ", ".join(dict.fromkeys(variant.name for variant in variants))
    given = {"configs": names, "seeds": str(seeds)}
    return given | ({"tokens": str(tokens)} if tokens else {})


def _contestant(variant: Variant, parent: Path) -> VariantResult:
    """The entrant's run, made or found; a failure is told and kept."""
    known = {"name": variant.name, "seed": variant.seed}
    if variant.config is None:
        log_info(f"{variant.name} is left out: {variant.failure}")
        return VariantResult(**known, folder=None, failure=variant.failure)
    run_name = variant.config.run.name
    if finished := find_finished_outcome(variant.path, variant.overrides):
        log_info(f"{run_name}: finished before, validation loss {finished.report.loss:.4f}")
        set_parent_run(finished.folder, parent)
        return VariantResult(**known, folder=finished.folder)
    try:
        return VariantResult(**known, folder=call_task(pretrain_variant)(variant, run_name, parent))
    except ComparisonError as error:
        log_info(f"{run_name} is left out: {error.problems[0].rule}")
        return VariantResult(**known, folder=None, failure=error.problems[0].rule)


@task(name="pretrain-apart", task_run_name="{run_name}", cache_policy=NO_CACHE)
def pretrain_variant(variant: Variant, run_name: str, parent: Path) -> Path:
    """The flow `pretrain` in a process of its own, at the same API; the run's folder."""
    log_info(f"{run_name}: begins")
    return train_in_subprocess(variant, parent)


def _refuse_nothing(results: Sequence[VariantResult]) -> None:
    if any(contestant.folder for contestant in results):
        return
    raise ComparisonError(
        *[
            Problem(contestant.name, "", contestant.failure, "mend that and start again")
            for contestant in results
        ]
    )
