"""`overnight doctor`: check what a night of training needs; each finding has its remedy."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

import httpx
import psutil
import pynvml
import sqlalchemy
import torch
import yaml
from packaging.requirements import Requirement
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.exceptions import ObjectNotFound

from flows.service import deployments
from flows.service.settings import POOL, PROJECT, ServiceSettings, redact_password
from gpt.errors import first_line
from gpt.hardware.gpus import find_gpu
from tasks.tracking.metadata import default_tracking_uri

GOOD, NOTE, FAULT = "good", "note", "FAULT"
FREE_DISK_BYTES = 10 * 2**30
"""Checkpoints of the largest shipped config: all that are kept, and one being written."""
FREE_MEMORY_BYTES = 2 * 2**30
"""Memory of tokenizing or of one run beside the servers."""
CLOCK_SECONDS = 5.0
"""Clock difference that makes schedules and curves misleading."""
SCHEDULER_SECONDS = 120.0
"""Prefect schedules the runs of a newly active schedule within a minute."""
TIMEOUT_SECONDS = 5.0
GIB = 2**30
DEPLOY = "overnight up, or: prefect deploy --all"


@dataclass(frozen=True)
class Finding:
    what: str
    level: str
    found: str
    remedy: str = ""


def good(what: str, found: str) -> Finding:
    return Finding(what, GOOD, found)


def fault(what: str, found: str, remedy: str) -> Finding:
    return Finding(what, FAULT, found, remedy)


def check_machine(settings: ServiceSettings, has_server: bool) -> Iterator[Finding]:
    """Yield all findings. `has_server`: `overnight up` runs, or PREFECT_API_URL is set."""
    yield check_python()
    yield from check_packages(requires("overnight") or [])
    yield check_gpu()
    yield check_memory(psutil.virtual_memory().available)
    yield check_disk(settings.root)
    yield check_writable(settings.root)
    yield check_tracking_store(default_tracking_uri(settings.root))
    yield check_file_times(settings.root)
    if has_server:
        yield from check_prefect_server(settings)
    else:
        found = "none is running; `overnight run` needs none"
        remedy = "for deployments and schedules: overnight up"
        yield Finding("Prefect's server", NOTE, found, remedy)


def check_python(found: str = platform.python_version()) -> Finding:
    required = Requirement(f"python{metadata('overnight')['Requires-Python']}").specifier
    if required.contains(found):
        return good("Python", found)
    return fault("Python", f"{found}, needs {required}", "recreate .venv with a newer Python")


def check_packages(requirements: Iterable[str]) -> Iterator[Finding]:
    """Check that every required package is installed in an allowed version."""
    parsed = [Requirement(text) for text in requirements]
    needed = [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
    wrong = []
    for each in needed:
        try:
            found = version(each.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not each.specifier.contains(found, prereleases=True):
            remedy = f"pip install -c constraints.txt '{each.name}{each.specifier}'"
            wrong.append(fault(each.name, f"{found}, needs {each.specifier}", remedy))
    yield from wrong
    if not wrong:
        main = ", ".join(f"{name} {version(name)}" for name in ("prefect", "mlflow", "torch"))
        yield good("packages", f"{len(needed)} installed as required; {main}")


def check_gpu() -> Finding:
    name, driver = _read_driver()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        found = f"{name}, driver {driver}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if free < total / 2:
            return fault("GPU", found, "find the process with nvidia-smi and stop it")
        known = "" if find_gpu(name) else "; not a known GPU, so MFU and hours are not estimated"
        return good("GPU", found + known)
    if not name:
        remedy = "if there is a GPU, install NVIDIA's driver and check with nvidia-smi"
        return Finding("GPU", NOTE, "none: runs train on the CPU", remedy)
    remedy = f"update the driver to one for CUDA {torch.version.cuda} or newer"
    if torch.version.cuda is None:
        number = torch.__version__.split("+")[0]
        remedy = f"torch is a build for CPUs: pip install torch=={number}"
    found = f"{name}, driver {driver}, which torch {torch.__version__} cannot use"
    return fault("GPU", found, remedy)


def _read_driver() -> tuple[str, str]:
    """Return the first GPU's name and the driver's version; empty without a driver."""
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return str(pynvml.nvmlDeviceGetName(handle)), str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return "", ""


def check_memory(available_bytes: int) -> Finding:
    remedy = "stop other programs (top, then M), or lower data.workers"
    return _check_free("memory", available_bytes, FREE_MEMORY_BYTES, "", remedy)


def check_disk(root: Path) -> Finding:
    free = psutil.disk_usage(str(_nearest_existing(root))).free
    remedy = "free some space, or set run.root to another disk"
    return _check_free("disk", free, FREE_DISK_BYTES, f" below {root}", remedy)


def _check_free(what: str, free: int, needed: int, where: str, remedy: str) -> Finding:
    found = f"{free / GIB:.1f} GiB free{where}"
    if free >= needed:
        return good(what, found)
    return fault(what, f"{found}, needs {needed / GIB:.0f}", remedy)


def check_writable(root: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_nearest_existing(root)):
            return good("folder", f"{root} is writable")
    except OSError as error:
        remedy = "give the folder to the user that runs overnight (chown), or set another run.root"
        return fault("folder", f"{root} is not writable: {error.strerror}", remedy)


def _nearest_existing(path: Path) -> Path:
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def check_file_times(root: Path) -> Finding:
    """Check that no file was written in the future, i.e. that the clock was not set back."""
    ahead = max((path.stat().st_mtime for path in root.glob("*/*")), default=0.0) - time.time()
    now = datetime.now().astimezone()
    if ahead < CLOCK_SECONDS:
        return good("clock", f"{now:%Y-%m-%d %H:%M:%S %Z}")
    newer = timedelta(seconds=round(ahead))
    found = f"{now:%Y-%m-%d %H:%M}, but files below {root} are {newer} newer"
    return fault("clock", found, "set the clock: timedatectl set-ntp true")


def check_tracking_store(uri: str) -> Finding:
    """Check that MLflow's server answers, or that its database can be read."""
    shown = redact_password(uri)
    try:
        if uri.startswith("http"):
            httpx.get(f"{uri}/health", timeout=TIMEOUT_SECONDS).raise_for_status()
        elif uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
            return good("MLflow", f"{shown}, created by the first run")
        else:
            with sqlalchemy.create_engine(uri).connect() as connection:
                connection.execute(sqlalchemy.text("SELECT 1 FROM experiments LIMIT 1"))
                if uri.startswith("sqlite"):
                    check = connection.execute(sqlalchemy.text("PRAGMA quick_check(1)")).scalar()
                    if check != "ok":
                        raise OSError(check)
    except Exception as error:  # of any database or network
        remedy = "start that server, or unset MLFLOW_TRACKING_URI"
        if uri.startswith("sqlite"):
            remedy = "move the file away; `overnight sync RUN` fills a new one from the run folders"
        return fault("MLflow", f"{shown} does not work: {first_line(error)}", remedy)
    return good("MLflow", shown)


def check_prefect_server(settings: ServiceSettings) -> Iterator[Finding]:
    """Check the server and, if it answers, what is deployed to it."""
    what, url = "Prefect's server", settings.api_url
    if not url.rstrip("/").endswith("/api"):
        remedy = f"export PREFECT_API_URL={url.rstrip('/')}/api"
        yield fault(what, f"PREFECT_API_URL is {url}, which does not end in /api", remedy)
        return
    try:
        answer = httpx.get(f"{url}/admin/version", timeout=TIMEOUT_SECONDS).raise_for_status()
    except httpx.HTTPError as error:
        remedy = "overnight up, or unset PREFECT_API_URL"
        yield fault(what, f"{url} does not answer: {first_line(error)}", remedy)
        return
    theirs, ours = answer.json(), version("prefect")
    if theirs.split(".")[:2] == ours.split(".")[:2]:
        yield good(what, f"{url}, version {theirs}")
    else:
        remedy = f"use the same version on both sides: pip install prefect=={theirs}"
        yield fault(what, f"{url} has version {theirs}, this machine {ours}", remedy)
    yield check_server_clock(answer.headers["date"])
    with get_client(sync_client=True) as client:
        yield from check_work_pool(client)
        yield check_runs(client, settings)
        yield from check_deployments(client, PROJECT)


def check_server_clock(date: str) -> Finding:
    """Compare this clock with a `Date` header, which has whole seconds."""
    ahead = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    if abs(ahead) < CLOCK_SECONDS:
        return good("clock", "agrees with Prefect's server")
    found = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} Prefect's server"
    return fault("clock", found, "set both clocks: timedatectl set-ntp true")


def check_work_pool(client: SyncPrefectClient) -> Iterator[Finding]:
    """Check the pool, and that a worker serves it."""
    what = "work pool"
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        yield fault(what, f"{POOL} does not exist", "overnight up")
        return
    if pool.is_paused:
        yield fault(what, f"{POOL} is paused", f"prefect work-pool resume {POOL}")
    elif pool.concurrency_limit != 1:
        limit = pool.concurrency_limit or "no limit"
        found = f"{POOL} has concurrency limit {limit}; one GPU needs 1"
        yield fault(what, found, f"prefect work-pool set-concurrency-limit {POOL} 1")
    else:
        yield good(what, f"{POOL}, one run at a time")
    if online := deployments.read_online_workers(client):
        yield good("worker", f"online for {POOL}: {', '.join(online)}")
    else:
        yield fault("worker", f"none is online for {POOL}, so runs wait", "overnight up")


def check_runs(client: SyncPrefectClient, settings: ServiceSettings) -> Finding:
    if lost := deployments.find_lost_runs(client, settings.worker):
        found = f"without a process: {', '.join(run.name for run in lost)}"
        return fault("runs", found, "stop `overnight up` and start it again: they resume")
    names = [run.name for run in deployments.read_running(client, settings.worker)]
    return good("runs", f"running: {', '.join(names) or 'none'}")


def check_deployments(client: SyncPrefectClient, project: Path) -> Iterator[Finding]:
    """Check that the server has the deployments and schedules of prefect.yaml."""
    if not project.exists():
        yield fault("deployments", f"no {project} in this folder", "change into the checkout")
        return
    wanted = {each["name"]: each for each in yaml.safe_load(project.read_bytes())["deployments"]}
    deployed = {d.name: d for d in deployments.read_deployments(client)}
    if missing := [name for name in wanted if name not in deployed]:
        yield fault("deployments", f"missing: {', '.join(missing)}", DEPLOY)
    else:
        yield good("deployments", f"all {len(wanted)} of {project}")
    for name in wanted.keys() & deployed.keys():
        slugs = {each["slug"] for each in wanted[name].get("schedules", ())}
        yield from check_schedules(client, deployed[name], slugs)


def check_schedules(
    client: SyncPrefectClient, deployment: Any, slugs: set[str]
) -> Iterator[Finding]:
    what = f"schedule of {deployment.name}"
    for slug in slugs - {schedule.slug for schedule in deployment.schedules}:
        yield fault(what, f"{slug} is missing", DEPLOY)
    for schedule in deployment.schedules:
        cron = getattr(schedule.schedule, "cron", schedule.schedule)
        if not schedule.active:
            yield good(what, f"{cron}, switched off")
        elif deployment.paused:
            yield fault(what, f"{cron}, but the deployment is paused", "resume it on its page")
        elif due := _find_next_run(client, deployment):
            yield good(what, f"{cron}, next at {due.astimezone():%Y-%m-%d %H:%M %Z}")
        elif (datetime.now(UTC) - deployment.updated).total_seconds() < SCHEDULER_SECONDS:
            yield good(what, f"{cron}, switched on just now")
        else:
            remedy = "pip install 'sqlalchemy<2.1' (newer ones silently schedule nothing), then "
            remedy += "start `overnight up` again"
            yield fault(what, f"{cron} is active, but has no scheduled run", remedy)


def _find_next_run(client: SyncPrefectClient, deployment: Any) -> datetime | None:
    scheduled = FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}})
    own = DeploymentFilter.model_validate({"id": {"any_": [deployment.id]}})
    runs = client.read_flow_runs(flow_run_filter=scheduled, deployment_filter=own)
    times = (run.expected_start_time for run in runs if run.auto_scheduled)
    return min((each for each in times if each), default=None)
