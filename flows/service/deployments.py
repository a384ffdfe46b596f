"""The work pool of the GPU, its deployments, and runs whose process is gone."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from prefect import State
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Scheduled
from prefect.workers.process import ProcessWorker

from flows.service.settings import POOL, PROJECT
from gpt.errors import Problem, ServiceError

WORKER_LABEL = "prefect.worker.name"
ON_POOL = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
SLOT_STATES = ["RUNNING", "PENDING", "CANCELLING"]
"""States of a run that takes a slot of the pool."""


def create_work_pool(client: SyncPrefectClient) -> None:
    """Create the pool of processes with one slot, unless it exists. Its template stays as it is.

    Raises `ServiceError` if the pool has another type.
    """
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        pool = client.create_work_pool(
            WorkPoolCreate(
                name=POOL,
                type="process",
                description="One GPU: one run at a time",
                base_job_template=ProcessWorker.get_default_base_job_template(),
            )
        )
    if pool.type != "process":
        rule = "has another type, which a process worker cannot serve"
        remedy = f"remove it (prefect work-pool delete {POOL}) and start again"
        raise ServiceError(Problem("work pool", f"{POOL} ({pool.type})", rule, remedy))
    if pool.concurrency_limit != 1:
        client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=1))


def deploy(client: SyncPrefectClient) -> list[str]:
    """Deploy everything in prefect.yaml and return the deployments' names.

    Schedules that a user has switched on or off stay so. Raises `ServiceError`.
    """
    before = {(d.id, s.slug): s.active for d in read_deployments(client) for s in d.schedules}
    done = subprocess.run(
        [sys.executable, "-m", "gpt.gc_tuning", "prefect", "--no-prompt", "deploy", "--all"],
        # {{ $PWD }} in prefect.yaml is a shell variable, which may name another folder.
        env=os.environ | {"PWD": str(Path.cwd())},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    for deployment in read_deployments(client):
        for schedule in deployment.schedules:  # `prefect deploy` resets them to the file's
            active = before.get((deployment.id, schedule.slug), schedule.active)
            if active != schedule.active:
                client.update_deployment_schedule(deployment.id, schedule.id, active=active)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
        rule = f"cannot be deployed: {' '.join(reason)}"
        remedy = "run prefect deploy --all to see the whole error"
        raise ServiceError(Problem(str(PROJECT), "", rule, remedy))
    return read_names(client)


def read_names(client: SyncPrefectClient) -> list[str]:
    """Return the names of the pool's deployments as flow/deployment."""
    deployments = read_deployments(client)
    flows = {d.flow_id: client.read_flow(d.flow_id).name for d in deployments}
    return sorted(f"{flows[d.flow_id]}/{d.name}" for d in deployments)


def read_deployments(client: SyncPrefectClient) -> Sequence[DeploymentResponse]:
    return client.read_deployments(work_pool_filter=ON_POOL, limit=200)


def read_online_workers(client: SyncPrefectClient) -> list[str]:
    workers = client.read_workers_for_work_pool(POOL)
    return [worker.name for worker in workers if worker.status == WorkerStatus.ONLINE]


def read_running(client: SyncPrefectClient, worker: str) -> list[FlowRun]:
    """Return the worker's runs that take a slot of the pool, according to Prefect."""
    wanted = FlowRunFilter.model_validate({"state": {"type": {"any_": SLOT_STATES}}})
    runs = client.read_flow_runs(flow_run_filter=wanted, work_pool_filter=ON_POOL)
    return [run for run in runs if run.labels.get(WORKER_LABEL, worker) == worker]


def find_process(run: FlowRun) -> int | None:
    """Return the pid of a run's process on this machine; None if it has ended."""
    try:
        pid = int(run.infrastructure_pid or "")
        words = psutil.Process(pid).cmdline()
    except (ValueError, psutil.Error):
        return None
    return pid if any("prefect" in word for word in words) else None


def reschedule_lost_runs(client: SyncPrefectClient, worker: str) -> None:
    """Schedule runs again whose process is gone, e.g. after a power cut, which resumes them. One
    that was being cancelled becomes Cancelled. Otherwise each would keep the GPU's slot forever."""
    for run in read_running(client, worker):
        if find_process(run):
            continue
        if run.state and run.state.is_cancelling():
            state: State = Cancelled(message="its process ended while it was being cancelled")
        else:
            message = "its process ended unexpectedly; the run resumes from its checkpoint"
            state = Scheduled(name="Rescheduled", message=message)
        client.set_flow_run_state(run.id, state, force=True)
        print(f"the process of run {run.name} is gone; it is now {state.name}", flush=True)
