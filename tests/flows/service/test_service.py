"""`overnight up` as a person uses it: real servers, a real worker, deployments, schedules.

The tests of this file share one service and are in the order of a day: it comes up, runs, is
cancelled and killed, and is stopped last.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
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
from waiting import free_port, wait_for

from flows.service import deployments
from flows.service.settings import POOL, ServiceSettings
from gpt.config.loading import load_config
from gpt.training.checkpoint.retention import latest_checkpoint
from tasks.tracking.journal import METRICS_FILE, read_metrics
from tasks.tracking.mlflow_api import MlflowClient

EXIT_SECONDS = 25.0
DEPLOYED = [
    *("compare/widths", "pretrain/gpt-480", "pretrain/gpt-576", "pretrain/gpt-720"),
    *("pretrain/gpt-768", "pretrain/tiny", "retrain/nightly"),
]
FOREVER = {"max_steps": 100_000, "grad_acc": 8}
EVERY_MINUTE = "pretrain/gpt-768"
"""Refused at once, as its data are not there."""


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
    with service.client() as client:  # now, so that a minute has gone by when it is asked for
        deployment = client.read_deployment_by_name(EVERY_MINUTE)
        schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="* * * * *"), active=True)
        client.create_deployment_schedules(deployment.id, [(schedule.schedule, schedule.active)])
    yield service
    service.kill()


@pytest.fixture(scope="module")
def webhook(service: Service) -> Webhook:
    """Known to Prefect as the block custom-webhook/phone."""
    hook = Webhook()
    service.python(f"""
from prefect.blocks.notifications import CustomWebhookNotificationBlock
told = {{"subject": "{{{{subject}}}}", "body": "{{{{body}}}}"}}
CustomWebhookNotificationBlock(name="phone", url={hook.url!r}, json_data=told).save("phone")
""")
    return hook


def told(name: str) -> dict[str, Any]:
    """A run that tells of its end, the first time in vain."""
    return {"run": {"name": name, "notify": ["slack-webhook/unknown", "custom-webhook/phone"]}}


def page_of(service: Service, run: FlowRun) -> str:
    """Of how it ended, which is written after it has."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))

    def pages() -> list[Artifact]:
        with service.client() as client:
            found = client.read_artifacts(artifact_filter=wanted)
        return [page for page in found if page.key and page.key.startswith("end-")]

    (page,) = wait_for(f"the page of {run.name}", pages)
    return str(page.data)


def test_everything_is_up_and_said_where(service: Service) -> None:
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


def test_whatever_is_started_together_runs_one_after_the_other(
    service: Service, webhook: Webhook
) -> None:
    """Three deployments, and one of them once more from the command line."""
    names = ("pretrain/tiny", "pretrain/gpt-480", "pretrain/gpt-576")
    runs = [
        service.deployed(name, run={"name": f"together-{number}"})
        for number, name in enumerate(names)
    ]
    overrides = json.dumps(small(**told("watched")))
    watched = service.prefect(
        *("deployment", "run", "pretrain/tiny", "-p", f"overrides={overrides}", "--watch")
    )
    assert watched.returncode == 0, watched.stdout
    assert "Completed" in watched.stdout

    assert [service.ended(run).state_name for run in runs] == ["Completed"] * len(runs)
    with service.client() as client:
        everything = [run.id for run in client.read_flow_runs()]

    def trained() -> list[TaskRun]:
        """Prefect's server takes them from events, which may come after the run's own end."""
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
    """The runs of the schedule in such a state."""
    deployment = client.read_deployment_by_name(EVERY_MINUTE)
    runs = [run for run in client.read_flow_runs(limit=200) if run.auto_scheduled]
    ours = [run for run in runs if run.deployment_id == deployment.id]
    return [run for run in ours if run.state and run.state.type == kind]


def planned(client: SyncPrefectClient) -> list[FlowRun]:
    """Those that are still to come."""
    runs = on_schedule(client, StateType.SCHEDULED)
    return [run for run in runs if run.expected_start_time > datetime.now(UTC)]


def test_a_schedule_fires_each_minute_until_it_is_paused(service: Service) -> None:
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


def test_what_cannot_work_fails_at_validate_config_and_says_what_to_do(
    service: Service, webhook: Webhook
) -> None:
    run = service.deployed("pretrain/gpt-576", **told("wrong"), model={"n_embd": 512, "n_head": 12})
    run = service.ended(run)
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


def test_one_key_is_changed_and_no_other(service: Service) -> None:
    """The config as the run was given it, against the file with that key changed."""
    named = {"run": {"name": "seven"}}
    run = service.ended(service.deployed("pretrain/tiny", **named, training={"max_steps": 7}))
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
    """The last one in the journal; 0 where there is none yet."""
    folder = run_folder(service)
    lines, _ = read_metrics(folder / METRICS_FILE) if folder else ([], 0)
    return max((line.step for line in lines), default=0)


def in_training(service: Service, after: int, **training: Any) -> FlowRun:
    """The run `night`, started, and some steps beyond `after`."""
    run = service.deployed("pretrain/tiny", **told("night"), training=FOREVER | training)
    wait_for(f"step {after + 8}", lambda: last_step(service) >= after + 8)
    run = service.read(run)
    psutil.Process(pid_of(run)).nice(19)  # it would train on through all that is waited for
    return run


def pid_of(run: FlowRun) -> int:
    pid = deployments.find_process(run)
    assert pid
    return pid


def test_cancelled_it_leaves_a_checkpoint(service: Service, webhook: Webhook) -> None:
    run = in_training(service, 0)
    pid = pid_of(run)
    assert service.prefect("flow-run", "cancel", str(run.id)).returncode == 0
    begin = time.monotonic()
    wait_for("the process to exit", lambda: not psutil.pid_exists(pid))
    assert time.monotonic() - begin < EXIT_SECONDS
    assert service.ended(run).state_name == "Cancelled"
    folder = run_folder(service)
    assert folder
    checkpoint = latest_checkpoint(folder)
    assert checkpoint
    assert checkpoint.step == last_step(service)
    assert "Run it again" in webhook.about("night: cancelled")["body"].splitlines()[0]


def test_killed_it_is_told_of(service: Service, webhook: Webhook) -> None:
    run = in_training(service, last_step(service))
    os.kill(pid_of(run), signal.SIGKILL)
    assert service.ended(run).state_name == "Crashed"
    body = webhook.about("night: crashed")["body"]
    assert "Run it again" in body.splitlines()[0]
    assert "a checkpoint of step" in body


def test_a_worker_that_is_killed_comes_back_and_its_run_goes_on(service: Service) -> None:
    run = in_training(service, last_step(service))
    pid, worker = pid_of(run), service.worker()
    worker.kill()
    wait_for("another worker", lambda: service.worker() != worker)
    step = last_step(service)
    wait_for("more steps", lambda: last_step(service) > step + 8)
    assert pid_of(service.read(run)) == pid

    # As a power cut takes both; the run that then holds the GPU's only slot has no process.
    service.worker().kill()
    os.kill(pid, signal.SIGKILL)
    wait_for("the run to be started again", lambda: service.read(run).run_count == 2)
    step = last_step(service)
    wait_for("more steps", lambda: last_step(service) > step + 8)
    os.kill(pid_of(service.read(run)), signal.SIGTERM)
    assert service.ended(run).state_name == "Cancelled"


def test_on_a_node_that_is_taken_away_it_is_planned_again(service: Service) -> None:
    with service.client() as client:
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=True))
        run = service.deployed("pretrain/tiny", **told("night"), training=FOREVER)
        before = last_step(service)
        pod = service.starts("flow-run", "execute", str(run.id))
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


def test_in_mlflow_it_stayed_one_run(service: Service) -> None:
    steps = last_step(service) + 5
    run = service.ended(
        service.deployed("pretrain/tiny", **told("night"), training=FOREVER | {"max_steps": steps})
    )
    assert run.state_name == "Completed"
    client = MlflowClient(service.mlflow_uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "overnight"]
    (found,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'night'")
    assert found.info.status == "FINISHED"
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert [point.step for point in points] == list(range(1, steps + 1))


# --- new data ------------------------------------------------------------------------------------


def test_a_file_that_has_come_starts_a_retraining_with_its_path(
    service: Service, parquet: Path
) -> None:
    folder = service.project / "incoming"
    folder.mkdir()
    source = {"data": {**SMALL["data"], "source": "incoming/*.parquet"}}
    no_champion = {"tracking": {"registered_model": "new-data"}}
    overrides = small(**told("new-data"), **source, **no_champion)
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
            # As a watcher does that was killed before it had crossed the event out.
            service.python(f"""
from pathlib import Path
from uuid import UUID
from flows.service.events import send_file_event
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
        first, second = sorted(map(service.ended, started()), key=lambda run: run.start_time)
        assert (first.state_name, second.state_name) == ("Completed", "Completed")
        assert first.parameters == given | {"path": str(arrived)}
        assert "there is no champion yet" in page_of(service, first)
        assert "unchanged" in page_of(service, second)
        assert len(started()) == 2, "one a file, one for the event that was sent twice"


# --- the doctor ----------------------------------------------------------------------------------


def findings(service: Service, **settings: str) -> dict[str, dict[str, str]]:
    """Of a doctor's visit, by what they are about; the faults win."""
    done = service.run("doctor", "--json", **settings)
    found = sorted(json.loads(done.stdout), key=lambda finding: finding["level"] == "FAULT")
    assert done.returncode == (1 if found[-1]["level"] == "FAULT" else 0)
    return {finding["what"]: finding for finding in found}


def faults(service: Service) -> dict[str, dict[str, str]]:
    return {k: v for k, v in findings(service).items() if v["level"] == "FAULT"}


def test_the_doctor_finds_what_is_wrong_with_the_service(service: Service) -> None:
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


def test_ctrl_c_leaves_no_process_and_a_checkpoint(service: Service) -> None:
    run = service.deployed("pretrain/tiny", run={"name": "last"}, training=FOREVER)

    def training() -> bool:
        journals = [f / METRICS_FILE for f in (service.root / "train").glob("last-*")]
        return any(line.step > 0 for path in journals for line in read_metrics(path)[0])

    wait_for("the run", training)
    everything = [*service.family(), psutil.Process(pid_of(service.read(run)))]
    assert len(everything) >= 5
    service.interrupt()
    _, left = psutil.wait_procs(everything, timeout=5)
    assert left == []
    (folder,) = (service.root / "train").glob("last-*")
    assert latest_checkpoint(folder)
    assert not (service.project / "prefect.toml").exists()
    assert not (service.root / "service.json").exists()
    assert "stopped" in service.log.read_text()
