"""`overnight up` with real servers, a real worker, deployments and schedules.

The tests share one service and run in order: it starts, runs flows, which are cancelled and killed,
and is stopped last.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from overnight_up import ROOT, SMALL, Service, Webhook, small
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    WorkPoolUpdate,
)
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import Artifact, FlowRun, StateType, TaskRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.states import Cancelled, Running
from waiting import free_port, scaled, wait_for

from flows.service import deployments
from flows.service.settings import POOL, ServiceSettings
from gpt.config.loading import load_config
from gpt.training.checkpoint.retention import latest_checkpoint
from tasks.tracking.journal import METRICS_FILE, read_metrics
from tasks.tracking.mlflow_api import MlflowClient

DEPLOYED = [
    *("compare/widths", "pretrain/gpt-480", "pretrain/gpt-576", "pretrain/gpt-720"),
    *("pretrain/gpt-768", "pretrain/tiny", "retrain/nightly"),
]
FOREVER = {"max_steps": 100_000, "grad_acc": 8}
EVERY_MINUTE = "pretrain/gpt-768"
"""Fails at once, because its data do not exist."""


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory,
    parquet: Path,
    mlflow_database: Path,
    prefect_database: Path,
) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("up"), parquet, (free_port(), free_port()))
    for database in (mlflow_database, prefect_database):
        (service.root / database.stem).mkdir(parents=True)
        shutil.copy(database, service.root / database.stem)
    service.start()
    with service.client() as client:  # now: it fires within a minute
        deployment = client.read_deployment_by_name(EVERY_MINUTE)
        schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="* * * * *"), active=True)
        client.create_deployment_schedules(deployment.id, [(schedule.schedule, schedule.active)])
    yield service
    service.kill()


@pytest.fixture(scope="module")
def webhook(service: Service) -> Webhook:
    """Return a webhook that Prefect knows as the block custom-webhook/phone."""
    hook = Webhook()
    service.python(f"""
from prefect.blocks.notifications import CustomWebhookNotificationBlock
data = {{"subject": "{{{{subject}}}}", "body": "{{{{body}}}}"}}
CustomWebhookNotificationBlock(name="phone", url={hook.url!r}, json_data=data).save("phone")
""")
    return hook


def notifying(name: str) -> dict[str, Any]:
    """Return overrides of a run that notifies an unknown block and the webhook."""
    return {"run": {"name": name, "notify": ["slack-webhook/unknown", "custom-webhook/phone"]}}


def page_of(service: Service, run: FlowRun) -> str:
    """Wait for the report of how a run ended, which is written after its end."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))

    def pages() -> list[Artifact]:
        with service.client() as client:
            found = client.read_artifacts(artifact_filter=wanted)
        return [page for page in found if page.key and page.key.startswith("end-")]

    (page,) = wait_for(f"the page of {run.name}", pages)
    return str(page.data)


def test_up_prints_addresses_and_refuses_second_service(service: Service) -> None:
    with service.client() as client:
        assert deployments.read_names(client) == DEPLOYED
        pool = client.read_work_pool(POOL)
        assert (pool.type, pool.concurrency_limit) == ("process", 1)
    assert service.api_url.removesuffix("/api") in service.log.read_text()
    assert service.mlflow_uri in service.log.read_text()

    again = service.run("up")
    assert again.returncode == 2
    assert "is already running" in again.stderr
    assert service.api_url in again.stderr


@pytest.mark.slow
def test_runs_started_together_run_one_after_the_other(service: Service, webhook: Webhook) -> None:
    """Three deployments, and one of them again from the command line."""
    names = ("pretrain/tiny", "pretrain/gpt-480", "pretrain/gpt-576")
    runs = [
        service.start_run(name, run={"name": f"together-{number}"})
        for number, name in enumerate(names)
    ]
    overrides = json.dumps(small(**notifying("watched")))
    watched = service.prefect(
        *("deployment", "run", "pretrain/tiny", "-p", f"overrides={overrides}", "--watch")
    )
    assert watched.returncode == 0, watched.stdout
    assert "Completed" in watched.stdout

    assert [service.wait_for_end(run).state_name for run in runs] == ["Completed"] * len(runs)
    with service.client() as client:
        everything = [run.id for run in client.read_flow_runs()]

    def trained() -> list[TaskRun]:
        """Prefect's server records task runs from events, perhaps after the run's own end."""
        found = [t for t in service.task_runs(*everything) if t.name == "train" and t.end_time]
        return found if len(found) > len(runs) else []

    tasks = wait_for("the train tasks", trained)
    times = sorted((task.start_time, task.end_time) for task in tasks)
    assert len(times) == len(runs) + 1
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))

    client = MlflowClient(service.mlflow_uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "overnight"]
    found = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in found} == {"watched", *(f"together-{n}" for n in range(3))}
    assert {run.info.status for run in found} == {"FINISHED"}
    assert webhook.about("watched")["body"].startswith("Finished")


# --- schedules -----------------------------------------------------------------------------------


def on_schedule(client: SyncPrefectClient, kind: StateType) -> list[FlowRun]:
    """Return the scheduled runs in a state."""
    deployment = client.read_deployment_by_name(EVERY_MINUTE)
    runs = [run for run in client.read_flow_runs(limit=200) if run.auto_scheduled]
    ours = [run for run in runs if run.deployment_id == deployment.id]
    return [run for run in ours if run.state and run.state.type == kind]


def planned(client: SyncPrefectClient) -> list[FlowRun]:
    """Return the runs that are due in the future."""
    runs = on_schedule(client, StateType.SCHEDULED)
    return [run for run in runs if run.expected_start_time > datetime.now(UTC)]


@pytest.mark.slow
def test_schedule_fires_until_it_is_paused(service: Service) -> None:
    with service.client() as client:
        fired = wait_for("a run on schedule", lambda: on_schedule(client, StateType.FAILED))
        assert "data.source" in (fired[0].state.message or "")
        assert planned(client)
        report = service.run("doctor", "--json")
        assert "next at" in report.stdout

        deployment = client.read_deployment_by_name(EVERY_MINUTE)
        (schedule,) = deployment.schedules
        client.update_deployment_schedule(deployment.id, schedule.id, active=False)
        wait_for("nothing planned", lambda: not planned(client))


# --- one run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_invalid_config_fails_at_first_task_with_remedy(service: Service, webhook: Webhook) -> None:
    run = service.start_run(
        "pretrain/gpt-576", **notifying("wrong"), model={"n_embd": 512, "n_head": 12}
    )
    run = service.wait_for_end(run)
    assert run.state
    assert run.state.type == StateType.FAILED
    tasks = wait_for("its task runs", lambda: service.task_runs(run.id))
    assert [task.name for task in tasks] == ["validate-config"]
    assert not list((service.root / "train").glob("wrong-*"))
    first_line = (run.state.message or "").splitlines()[0]
    assert first_line.startswith("To do: model.n_embd: use one of: 480/12")
    assert "512 / 12 = 42.67" in (run.state.message or "")
    page = page_of(service, run)
    assert page.startswith("To do: model.n_embd: use one of: 480/12")
    assert "prefect deployment run pretrain/gpt-576" in page.splitlines()[0]
    assert webhook.about("wrong") == {
        "subject": "overnight: pretrain wrong: failed",
        "body": page,
    }


def test_override_changes_one_key_only(service: Service) -> None:
    """Compare the run's config with the file's with that key changed."""
    named = {"run": {"name": "seven"}}
    run = service.wait_for_end(
        service.start_run("pretrain/tiny", **named, training={"max_steps": 7})
    )
    assert run.state_name == "Completed"
    (folder,) = (service.root / "train").glob("seven-*")
    ran = json.loads((folder / "config.json").read_text())
    asked = load_config(ROOT / "configs" / "tiny.toml", small(**named, training={"max_steps": 7}))
    assert ran == json.loads(asked.model_dump_json())
    plain = load_config(ROOT / "configs" / "tiny.toml", small(**named)).flatten()
    assert [key for key, value in asked.flatten().items() if plain[key] != value] == [
        "training.max_steps"
    ]


# --- cancelled, killed ---------------------------------------------------------------------------


def run_folder(service: Service) -> Path | None:
    return next(iter((service.root / "train").glob("night-*")), None)


def last_step(service: Service) -> int:
    """Return the last step in the journal; 0 if there is none."""
    folder = run_folder(service)
    lines, _ = read_metrics(folder / METRICS_FILE) if folder else ([], 0)
    return max((line.step for line in lines), default=0)


def in_training(service: Service, after: int, **training: Any) -> FlowRun:
    """Start the run `night` and wait for some steps beyond `after`."""
    run = service.start_run("pretrain/tiny", **notifying("night"), training=FOREVER | training)
    wait_for(f"step {after + 8}", lambda: last_step(service) >= after + 8)
    run = service.read(run)
    psutil.Process(pid_of(run)).nice(19)  # leaves the cores to what is waited for
    return run


def pid_of(run: FlowRun) -> int:
    pid = deployments.find_process(run)
    assert pid
    return pid


@pytest.mark.slow
def test_cancelled_run_writes_checkpoint(service: Service, webhook: Webhook) -> None:
    run = in_training(service, 0)
    pid = pid_of(run)
    assert service.prefect("flow-run", "cancel", str(run.id)).returncode == 0
    wait_for("the process to exit", lambda: not psutil.pid_exists(pid))
    assert service.wait_for_end(run).state_name == "Cancelled"
    folder = run_folder(service)
    assert folder
    checkpoint = latest_checkpoint(folder)
    assert checkpoint
    assert checkpoint.step == last_step(service)  # a killed run leaves an older one
    assert "Run it again" in webhook.about("night: cancelled")["body"].splitlines()[0]


@pytest.mark.slow
def test_killed_run_is_reported(service: Service, webhook: Webhook) -> None:
    run = in_training(service, last_step(service))
    os.kill(pid_of(run), signal.SIGKILL)
    assert service.wait_for_end(run).state_name == "Crashed"
    body = webhook.about("night: crashed")["body"]
    assert "Run it again" in body.splitlines()[0]
    assert "a checkpoint of step" in body


@pytest.mark.slow
def test_killed_worker_restarts_and_its_runs_continue(service: Service) -> None:
    run = in_training(service, last_step(service))
    pid, worker = pid_of(run), service.worker()
    worker.kill()
    wait_for("another worker", lambda: service.worker() != worker)
    step = last_step(service)
    wait_for("more steps", lambda: last_step(service) > step + 8)
    assert pid_of(service.read(run)) == pid

    # A power cut takes both; the run that holds the GPU's only slot has no process then.
    service.worker().kill()
    os.kill(pid, signal.SIGKILL)
    wait_for("the run to be started again", lambda: service.read(run).run_count == 2)
    step = last_step(service)
    wait_for("more steps", lambda: last_step(service) > step + 8)
    os.kill(pid_of(service.read(run)), signal.SIGTERM)
    assert service.wait_for_end(run).state_name == "Cancelled"


@pytest.mark.slow
def test_run_on_preempted_node_is_rescheduled(service: Service) -> None:
    with service.client() as client:
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=True))
        run = service.start_run("pretrain/tiny", **notifying("night"), training=FOREVER)
        before = last_step(service)
        pod = service.start_command("flow-run", "execute", str(run.id))
        wait_for("more steps", lambda: last_step(service) > before + 8)
        pod.terminate()
        assert pod.wait(60) == 0
        found = service.read(run)
        assert (found.state_name, found.run_count) == ("AwaitingRetry", 1)
        folder = run_folder(service)
        assert folder
        checkpoint = latest_checkpoint(folder)
        assert checkpoint
        assert checkpoint.step == last_step(service)
        client.set_flow_run_state(run.id, Cancelled(), force=True)
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=False))


@pytest.mark.slow
def test_resumed_run_stays_one_mlflow_run(service: Service) -> None:
    steps = last_step(service) + 5
    run = service.wait_for_end(
        service.start_run(
            "pretrain/tiny", **notifying("night"), training=FOREVER | {"max_steps": steps}
        )
    )
    assert run.state_name == "Completed"
    client = MlflowClient(service.mlflow_uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "overnight"]
    (found,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'night'")
    assert found.info.status == "FINISHED"
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in points] == list(range(1, steps + 1))


# --- new data ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_new_file_starts_retraining_with_its_path(service: Service, parquet: Path) -> None:
    folder = service.project / "incoming"
    folder.mkdir()
    source = {"data": {**SMALL["data"], "source": "incoming/*.parquet"}}
    no_champion = {"tracking": {"registered_model": "new-data"}}
    overrides = small(**notifying("new-data"), **source, **no_champion)
    with service.client() as client:
        deployment = client.read_deployment_by_name("retrain/nightly")
        given = {"config": "configs/tiny.toml", "overrides": overrides}
        client.update_deployment(deployment.id, DeploymentUpdate(parameters=given))

        def started() -> list[FlowRun]:
            runs = client.read_flow_runs(limit=200)
            return [run for run in runs if run.deployment_id == deployment.id]

        watching = subprocess.Popen(
            service.command("watch", str(folder), "--interval", "0.5"),
            **{"cwd": service.project, "env": service.environment},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        )
        assert watching.stdout
        try:
            assert "watching" in watching.stdout.readline()
            arrived = folder / "new.parquet"
            shutil.copy(parquet, arrived)
            assert f"{arrived} is new" in watching.stdout.readline()
            wait_for("the flow run", started)
            # What a watcher does that was killed before it saved that the event was sent.
            service.python(f"""
from pathlib import Path
from uuid import UUID
from flows.service.watch import send_file_event
for _ in range(2):
    send_file_event(Path({str(arrived)!r}), UUID(int=7))
""")
            wait_for("the second flow run", lambda: len(started()) == 2)
            watching.send_signal(signal.SIGINT)
            assert "stopped watching" in watching.stdout.read()
            assert watching.wait(10) == 0
        finally:
            watching.kill()
            watching.stdout.close()
        first, second = sorted(map(service.wait_for_end, started()), key=lambda run: run.start_time)
        assert (first.state_name, second.state_name) == ("Completed", "Completed")
        assert first.parameters == given | {"path": str(arrived)}
        assert "there is no champion yet" in page_of(service, first)
        assert "unchanged" in page_of(service, second)
        assert len(started()) == 2, "one for the file, one for the event that was sent twice"


# --- the doctor ----------------------------------------------------------------------------------


def findings(service: Service, **settings: str) -> dict[str, dict[str, str]]:
    """Return the doctor's findings by subject; faults win."""
    done = service.run("doctor", "--json", **settings)
    found = sorted(json.loads(done.stdout), key=lambda finding: finding["level"] == "FAULT")
    assert done.returncode == (1 if found[-1]["level"] == "FAULT" else 0)
    return {finding["what"]: finding for finding in found}


def faults(service: Service) -> dict[str, dict[str, str]]:
    return {k: v for k, v in findings(service).items() if v["level"] == "FAULT"}


@pytest.mark.slow
def test_doctor_finds_faults_of_the_service(service: Service) -> None:
    assert faults(service) == {}
    settings = ServiceSettings(service.root, "127.0.0.1", *service.ports)
    with service.client() as client:
        # Four faults at once.
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=3))
        gone = client.read_deployment_by_name("pretrain/gpt-720")
        client.delete_deployment(gone.id)
        paused = client.read_deployment_by_name("compare/widths")
        cron = CronSchedule(cron="0 22 * * *")
        client.create_deployment_schedules(paused.id, [(cron, True)])
        client.pause_deployment(paused.id)
        held = client.create_flow_run_from_deployment(
            client.read_deployment_by_name("pretrain/tiny").id
        )
        client.set_flow_run_state(held.id, Running(), force=True)
        found = faults(service)
        assert set(found) == {"work pool", "deployments", "runs", "schedule of widths"}
        assert found["work pool"]["remedy"].endswith("set-concurrency-limit gpu 1")
        assert "gpt-720" in found["deployments"]["found"]
        assert held.name in found["runs"]["found"]
        assert "paused" in found["schedule of widths"]["found"]
        client.delete_flow_run(held.id)
    assert settings.worker in findings(service)["worker"]["found"]


# --- the end -------------------------------------------------------------------------------------


def test_ctrl_c_leaves_a_checkpoint_and_no_process(service: Service) -> None:
    run = service.start_run("pretrain/tiny", run={"name": "last"}, training=FOREVER)

    def training() -> bool:
        journals = [f / METRICS_FILE for f in (service.root / "train").glob("last-*")]
        return any(line.step > 0 for path in journals for line in read_metrics(path)[0])

    wait_for("the run", training)
    everything = [*service.family(), psutil.Process(pid_of(service.read(run)))]
    assert len(everything) >= 5
    service.interrupt()
    _, left = psutil.wait_procs(everything, timeout=scaled(10))
    assert left == []
    (folder,) = (service.root / "train").glob("last-*")
    assert latest_checkpoint(folder)
    assert not (service.project / "prefect.toml").exists()
    assert not (service.root / "service.json").exists()
    assert "stopped" in service.log.read_text()
