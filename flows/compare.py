"""The flow `compare`: train several configs on one dataset, and say which one is best."""

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.runtime.flow_run import STATE_HOOKS, call_task, cancelled_on_signal
from flows.runtime.outcome import find_finished_outcome, locate_links
from flows.runtime.variants import (
    Variant,
    comparison_folder,
    expand_variants,
    train_in_subprocess,
)
from gpt.errors import ComparisonError, Problem
from gpt.training.run_lock import run_lock
from tasks.compare import Comparison, VariantResult
from tasks.compare import compare as compare_runs
from tasks.display import log_info
from tasks.tokenize_parquet import tokenize_parquet
from tasks.tracking.runs import open_run, set_parent_run, track_run_status


class ComparisonResult(Comparison):
    """The result of the flow `compare`."""

    name: str
    failed: tuple[str, ...]
    """A message for each config, or seed of it, without a result."""
    mlflow_run_id: str | None
    links: tuple[str, str]
    """See `locate_links`."""

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

    Finished runs are skipped; a config that fails is left out of the comparison.

    Args:
        configs: Paths of TOML configs.
        overrides: Values that replace those of every config: {"training": {"grad_acc": 8}}.
        tokens: Number of tokens to train each config on; default: its own `training.max_steps`.
        seeds: Number of seeds per config, counted up from its own `training.seed`.
        name: Name of the comparison; default: the names of the configs.
    """
    variants = expand_variants(configs, overrides or {}, tokens, seeds)
    shared = next(variant.config for variant in variants if variant.config)
    dataset = call_task(tokenize_parquet)(shared)
    folder = comparison_folder(shared.run.root, variants, name)
    with run_lock(folder):
        names = ", ".join(dict.fromkeys(variant.name for variant in variants))
        settings = {"configs": names, "seeds": str(seeds)}
        settings |= {"tokens": str(tokens)} if tokens else {}
        run = open_run(shared, dataset, folder, compared=settings)
        with track_run_status(run):
            results = tuple(_train_variant(variant, folder) for variant in variants)
            comparison = call_task(compare_runs)(run, results)
            if not any(result.folder for result in results):
                remedy = "fix this and re-run the same comparison"
                raise ComparisonError(*(Problem(r.name, "", r.failure, remedy) for r in results))
    return ComparisonResult(
        name=folder.name.rpartition("-")[0],
        **dict(comparison),
        failed=tuple(f"{r.name}: {r.failure}" for r in results if r.folder is None),
        mlflow_run_id=run.run_id,
        links=locate_links(shared, folder, run.uri),
    )


def _train_variant(variant: Variant, parent: Path) -> VariantResult:
    """Train a variant unless it is finished; a failure becomes part of the result."""
    folder, failure = None, variant.failure
    run_name = variant.config.run.name if variant.config else variant.name
    if variant.config and (finished := find_finished_outcome(variant.path, variant.overrides)):
        log_info(f"{run_name}: already finished, validation loss {finished.report.loss:.4f}")
        folder = finished.folder
        set_parent_run(folder, parent)
    elif not failure:
        try:
            folder = call_task(pretrain_variant)(variant, run_name, parent)
        except ComparisonError as error:
            failure = error.problems[0].rule
    if folder is None:
        log_info(f"{run_name} is left out: {failure}")
    return VariantResult(name=variant.name, folder=folder, failure=failure)


@task(name="pretrain-variant", task_run_name="{run_name}", cache_policy=NO_CACHE)
def pretrain_variant(variant: Variant, run_name: str, parent: Path) -> Path:
    """Run the flow `pretrain` in its own process, under the same Prefect API; return its folder."""
    log_info(f"{run_name}: starting")
    return train_in_subprocess(variant, parent)
