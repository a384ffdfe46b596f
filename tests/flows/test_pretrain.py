"""The whole flow, through a real Prefect server and a real MLflow store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, TaskRun
from waiting import wait_for

from flows.pretrain import pretrain
from gpt.errors import ConfigError
from gpt.training.checkpoint.retention import latest_checkpoint
from tasks.tracking.journal import METRICS_FILE, read_metrics
from tasks.tracking.mlflow_api import MlflowClient

pytestmark = pytest.mark.usefixtures("prefect_server")

STAGES = ["validate-config", "tokenize-parquet", "train", "evaluate", "register-model"]
HISTORIES = ("train/loss", "lr", "grad_norm", "tokens_per_second", "tokens_seen", "val/loss")


def last_flow_run() -> FlowRun:
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(), limit=100, sort=None)  # type: ignore[arg-type]
    return max(runs, key=lambda run: run.created or run.expected_start_time)


def task_runs(flow_run: FlowRun, last: str) -> list[TaskRun]:
    """Return the task runs once `last` has ended: the server records that from events."""
    wanted = TaskRunFilter(flow_run_id={"any_": [flow_run.id]})
    with get_client(sync_client=True) as client:

        def ended() -> list[TaskRun]:
            found = client.read_task_runs(task_run_filter=wanted)
            return found if last in {run.name for run in found if run.end_time} else []

        found = wait_for(f"the end of {last}", ended)
    return sorted(found, key=lambda run: run.start_time or run.expected_start_time)


def named(client: MlflowClient, name: str) -> list[Any]:
    experiments = [e.experiment_id for e in client.search_experiments()]
    return [run for run in client.search_runs(experiments) if run.info.run_name == name]


def steps(client: MlflowClient, run_id: str) -> dict[str, list[int]]:
    return {key: [m.step for m in client.get_metric_history(run_id, key)] for key in HISTORIES}


def test_end_to_end_then_again_without_change(
    tiny_config: Path, mlflow_client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {"run": {"name": "twice"}}
    outcome = pretrain(str(tiny_config), overrides)

    flow_run = last_flow_run()
    assert (flow_run.name, flow_run.state_name) == ("twice", "Completed")
    tasks = task_runs(flow_run, STAGES[-1])
    assert [run.name for run in tasks] == STAGES
    assert {run.state_name for run in tasks} == {"Completed"}
    printed = capsys.readouterr().out
    assert "step 12/12  loss" in printed
    assert "step 12/12  validation loss" in printed

    [run] = named(mlflow_client, "twice")
    assert run.info.run_id == outcome.mlflow_run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["model.n_embd"] == "16"
    assert run.data.params["tokens_per_step"] == str(2 * 2 * 32)
    assert run.data.metrics["val/loss"] == pytest.approx(outcome.report.loss)
    assert run.data.metrics["val/bits_per_byte"] == pytest.approx(outcome.report.bits_per_byte)
    assert run.data.metrics["final/loss"] == pytest.approx(outcome.report.loss)
    seen = mlflow_client.get_metric_history(
        run.info.run_id, "system/system_memory_usage_percentage"
    )
    assert [point.step for point in seen] == [10]
    [dataset] = run.inputs.dataset_inputs
    assert dataset.dataset.digest == run.data.params["dataset.fingerprint"][:36]
    names = [mlflow_client.get_logged_model(m.model_id).name for m in run.outputs.model_outputs]
    assert sorted(names) == ["step-10", "step-12"]
    assert str(outcome.registered) in printed
    registered = outcome.registered
    version = mlflow_client.get_model_version("gpt", registered.version)
    assert (version.run_id, version.tags["overnight.reason"]) == (
        run.info.run_id,
        registered.reason,
    )
    once = steps(mlflow_client, run.info.run_id)
    assert once["train/loss"] == list(range(1, 13))
    assert once["val/loss"] == [0, 6, 12]

    again = pretrain(str(tiny_config), overrides)

    assert again == outcome
    assert "already finished at step 12" in capsys.readouterr().out
    assert last_flow_run().state_name == "Completed"
    [same] = named(mlflow_client, "twice")
    assert same.info.end_time == run.info.end_time
    assert steps(mlflow_client, run.info.run_id) == once


@pytest.mark.slow
def test_fresh_starts_a_new_run(tiny_config: Path, mlflow_client: MlflowClient) -> None:
    overrides = {"run": {"name": "fresh"}, "training": {"max_steps": 2}}
    first = pretrain(str(tiny_config), overrides)
    second = pretrain(str(tiny_config), overrides, fresh=True)
    assert first.folder != second.folder
    assert first.folder.exists()
    assert len(named(mlflow_client, "fresh")) == 2


@pytest.mark.slow
def test_interrupted_run_resumes_in_same_mlflow_run(
    tiny_config: Path, mlflow_client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt.training.step import TrainState

    overrides = {"run": {"name": "broken-off"}}
    take = TrainState.micro_batches

    def fails(self: TrainState) -> Any:
        if self.step == 8:
            raise RuntimeError("the machine went away")
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "micro_batches", fails)
        with pytest.raises(RuntimeError, match="went away"):
            pretrain(str(tiny_config), overrides)
    [run] = named(mlflow_client, "broken-off")
    assert run.info.status == "FAILED"
    assert "went away" in run.data.tags["overnight.error"]

    pretrain(str(tiny_config), overrides)

    [run] = named(mlflow_client, "broken-off")
    assert run.info.status == "FINISHED"
    assert "overnight.error" not in run.data.tags
    assert steps(mlflow_client, run.info.run_id)["train/loss"] == list(range(1, 13))


@pytest.mark.slow
def test_prefect_timeout_leaves_checkpoint(
    tiny_config: Path, mlflow_client: MlflowClient, tiny_root: Path
) -> None:
    never = 1_000_000
    overrides = {
        "run": {"name": "limited"},
        "training": {"max_steps": never, "checkpoint_interval": never},
        "evaluation": {"interval": never},
    }
    for seconds in (6, 30, 120):  # a busy machine may not have begun to train by then
        with pytest.raises(TimeoutError):
            pretrain.with_options(timeout_seconds=seconds)(str(tiny_config), overrides)
        assert last_flow_run().state_name == "TimedOut"
        [run] = named(mlflow_client, "limited")
        assert run.info.status == "KILLED"
        [folder] = tiny_root.glob("train/limited-*")
        if any(line.step for line in read_metrics(folder / METRICS_FILE)[0]):
            break
    checkpoint = latest_checkpoint(folder)
    assert checkpoint
    assert checkpoint.step == steps(mlflow_client, run.info.run_id)["train/loss"][-1]


def test_invalid_config_fails_at_first_task(tiny_config: Path) -> None:
    with pytest.raises(ConfigError):
        pretrain(str(tiny_config), {"model": {"n_embd": 15}})
    flow_run = last_flow_run()
    assert flow_run.state_name == "Failed"
    assert flow_run.state
    assert "15 / 2 = 7.50" in (flow_run.state.message or "")
    [only] = task_runs(flow_run, "validate-config")
    assert (only.name, only.state_name) == ("validate-config", "Failed")
