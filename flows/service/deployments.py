"""The work pool with the GPU as its one slot, what is deployed to it, and runs that were lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from prefect import State
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Scheduled
from prefect.workers.process import ProcessWorker

from flows.service.supervisor import POOL, PROJECT
from gpt.errors import Problem, ServiceError

WORKER_LABEL = "prefect.worker.name"


def make_pool(client: SyncPrefectClient) -> None:
    """A pool of processes with one slot; one that is there keeps its template."""
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(
            WorkPoolCreate(
                name=POOL,
                type="process",
                description="One GPU: one run at a time",
                concurrency_limit=1,
                base_job_template=template,
            )
        )
        return
    if pool.type != "process":
        rule = "is a pool of another type, which no worker of processes can take from"
        remedy = f"remove it (prefect work-pool delete {POOL}) and start again"
        raise ServiceError(Problem("work pool", f"{POOL} ({pool.type})", rule, remedy))
    if pool.concurrency_limit != 1:
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=1))


def deploy(client: SyncPrefectClient) -> list[str]:
    """Deploy all of this folder's prefect.yaml; schedules that somebody switched on or off stay so.
    The deployments' names."""
    with _switches_kept(client):
        done = subprocess.run(
            [sys.executable, "-m", "gpt.gc_tuning", "prefect", "--no-prompt", "deploy", "--all"],
            # {{ $PWD }} in prefect.yaml is the shell's word, which may be of another folder.
            env=os.environ | {"PWD": str(Path.cwd())},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
        rule = f"cannot be deployed: {' '.join(reason)}"
        raise ServiceError(Problem(str(PROJECT), "", rule, "prefect deploy --all shows all of it"))
    return names(client)


def names(client: SyncPrefectClient) -> list[str]:
    """Of the deployments on the pool, as flow/deployment."""
    deployments = deployed(client)
    flows = {d.flow_id: client.read_flow(d.flow_id).name for d in deployments}
    return sorted(f"{flows[d.flow_id]}/{d.name}" for d in deployments)


def deployed(client: SyncPrefectClient) -> Sequence[DeploymentResponse]:
    """What runs on the pool."""
    return client.read_deployments(work_pool_filter=_on_pool(), limit=200)


@contextmanager
def _switches_kept(client: SyncPrefectClient) -> Iterator[None]:
    """Deploying switches a schedule as the file says, whatever a person has switched since."""
    before = {(d.id, s.slug): s.active for d in deployed(client) for s in d.schedules}
    yield
    for deployment in deployed(client):
        for schedule in deployment.schedules:
            active = before.get((deployment.id, schedule.slug), schedule.active)
            if active != schedule.active:
                client.update_deployment_schedule(deployment.id, schedule.id, active=active)


def _on_pool() -> WorkPoolFilter:
    return WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))


def read_online_workers(client: SyncPrefectClient) -> list[str]:
    """Names of those that take runs from the pool."""
    workers = client.read_workers_for_work_pool(POOL)
    return [worker.name for worker in workers if worker.status == WorkerStatus.ONLINE]


# --- runs whose process is gone ------------------------------------------------------------------


def running(client: SyncPrefectClient, worker: str) -> list[FlowRun]:
    """The runs of that worker that hold the pool's slot, as far as Prefect knows."""
    kinds = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    held = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=kinds)))
    runs = client.read_flow_runs(flow_run_filter=held, work_pool_filter=_on_pool())
    return [run for run in runs if run.labels.get(WORKER_LABEL, worker) == worker]


def find_process(run: FlowRun) -> int | None:
    """The pid of a run's process on this machine; None where that has ended."""
    try:
        pid = int(run.infrastructure_pid or "")
        words = psutil.Process(pid).cmdline()
    except (ValueError, psutil.Error):
        return None
    return pid if any("prefect" in word for word in words) else None


def reschedule_lost_runs(client: SyncPrefectClient, worker: str) -> list[FlowRun]:
    """Runs that Prefect holds for running and whose process is gone, as after a power cut: nobody
    else would end them, and each would hold the GPU's slot for good. They are scheduled again, and
    go on from their last checkpoint; one that was being cancelled is Cancelled. Those runs."""
    lost = [run for run in running(client, worker) if find_process(run) is None]
    for run in lost:
        if run.state and run.state.is_cancelling():
            state: State = Cancelled(message="its process was lost while it was being cancelled")
        else:
            message = "its process was lost, as by a power cut; it goes on from its checkpoint"
            state = Scheduled(name="Rescheduled", message=message)
        client.set_flow_run_state(run.id, state, force=True)
    return lost


def api() -> SyncPrefectClient:
    return get_client(sync_client=True)
