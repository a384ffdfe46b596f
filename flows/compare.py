"""Several configs on one data set, one after the other, and a page that says which is best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.runtime.embedded_api import environment_of_the_api
from flows.runtime.outcome import finished_outcome, look_mlflow, look_prefect
from flows.runtime.stages import TOLD, Call, as_function, as_task, stopped_or, told
from flows.runtime.variant_launcher import trained_apart
from flows.runtime.variants import Entrant, contest_folder, entrants_of
from gpt.artifacts import Artifact
from gpt.errors import ComparisonError, Problem
from gpt.training.run_lock import run_lock
from tasks.compare import Contestant
from tasks.compare import compare as compare_runs
from tasks.display import tell
from tasks.tokenize_parquet import tokenize_parquet
from tasks.tracking.runs import ended_by_outcome, open_comparison, put_below


class Compared(Artifact):
    """What a comparison came to."""

    name: str
    verdict: str
    markdown: str
    page: Path
    failed: tuple[str, ...]
    """Configs, or seeds of them, without a result."""
    mlflow_uri: str
    mlflow_run_id: str | None
    look_prefect: str
    look_mlflow: str

    def __str__(self) -> str:
        return self.verdict


def _flow_run_name() -> str:
    parameters = flow_run.get_parameters()
    return str(parameters["name"] or " ".join(Path(path).stem for path in parameters["configs"]))


@flow(name="compare", flow_run_name=_flow_run_name, **TOLD)
def compare(
    configs: list[str],
    overrides: dict[str, Any] | None = None,
    tokens: int | None = None,
    seeds: int = 1,
    name: str = "",
) -> Compared | State:
    """Train several configs on the same data, one after the other, and compare them.

    What is finished is not done again; a config that fails is left out of the comparison.

    Args:
        configs: Paths of TOML configs.
        overrides: Values laid over each of them, key by key: {"training": {"grad_acc": 8}}.
        tokens: Train each on so many tokens, in place of its own max_steps.
        seeds: Train each so many times, with seeds counted up from its own.
        name: Of the comparison; left out: the configs' names.
    """
    return told(lambda: _stages(configs, overrides or {}, tokens, seeds, name, as_task))


def compare_without_prefect(
    configs: list[str], overrides: dict[str, Any], tokens: int | None, seeds: int, name: str
) -> Compared | State:
    """The same, told to nobody."""
    return stopped_or(lambda: _stages(configs, overrides, tokens, seeds, name, as_function))


def _stages(
    configs: list[str],
    overrides: dict[str, Any],
    tokens: int | None,
    seeds: int,
    name: str,
    call: Call,
) -> Compared:
    entrants = entrants_of(configs, overrides, tokens, seeds)
    shared = next(entrant.config for entrant in entrants if entrant.config)
    dataset = call(tokenize_parquet)(shared)
    folder = contest_folder(shared.run.root, entrants, name)
    with run_lock(folder):
        run = open_comparison(shared, dataset, folder, _compared(entrants, tokens, seeds))
        with ended_by_outcome(run):
            contestants = tuple(_contestant(entrant, folder, call) for entrant in entrants)
            comparison = call(compare_runs)(run, contestants)
            _refuse_nothing(contestants)
    return Compared(
        name=folder.name.rpartition("-")[0],
        verdict=comparison.verdict,
        markdown=comparison.markdown,
        page=comparison.page,
        failed=tuple(f"{c.name}: {c.failure}" for c in contestants if c.folder is None),
        mlflow_uri=run.uri,
        mlflow_run_id=run.run_id,
        look_prefect=look_prefect(shared),
        look_mlflow=look_mlflow(run.uri, folder),
    )


def _compared(entrants: Sequence[Entrant], tokens: int | None, seeds: int) -> dict[str, str]:
    """Parameters of the MLflow run above those compared."""
    names = ", ".join(dict.fromkeys(entrant.name for entrant in entrants))
    given = {"configs": names, "seeds": str(seeds)}
    return given | ({"tokens": str(tokens)} if tokens else {})


def _contestant(entrant: Entrant, parent: Path, call: Call) -> Contestant:
    """The entrant's run, made or found; a failure is told and kept."""
    known = {"name": entrant.name, "seed": entrant.seed}
    if entrant.config is None:
        tell(f"{entrant.name} is left out: {entrant.failure}")
        return Contestant(**known, folder=None, failure=entrant.failure)
    run_name = entrant.config.run.name
    if finished := finished_outcome(entrant.path, entrant.overrides):
        tell(f"{run_name}: finished before, validation loss {finished.report.loss:.4f}")
        put_below(finished.folder, parent)
        return Contestant(**known, folder=finished.folder)
    try:
        return Contestant(**known, folder=call(pretrain_apart)(entrant, run_name, parent))
    except ComparisonError as error:
        tell(f"{run_name} is left out: {error.problems[0].rule}")
        return Contestant(**known, folder=None, failure=error.problems[0].rule)


@task(name="pretrain-apart", task_run_name="{run_name}", cache_policy=NO_CACHE)
def pretrain_apart(entrant: Entrant, run_name: str, parent: Path) -> Path:
    """The flow `pretrain` in a process of its own, at the same API; the run's folder."""
    tell(f"{run_name}: begins")
    return trained_apart(entrant, parent, environment_of_the_api())


def _refuse_nothing(contestants: Sequence[Contestant]) -> None:
    if any(contestant.folder for contestant in contestants):
        return
    raise ComparisonError(
        *[
            Problem(contestant.name, "", contestant.failure, "mend that and start again")
            for contestant in contestants
        ]
    )
