"""`overnight doctor`: check what a night of training needs; each finding has its remedy."""

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
from gpt.hardware.calibration import read_calibration
from gpt.hardware.gpus import GIB, find_gpu
from gpt.hardware.target_gpu import installed_gpus
from gpt.preflight.time import existing_ancestor
from tasks.tracking.metadata import default_tracking_uri

GOOD, NOTE, FAULT = "good", "note", "FAULT"
FREE_DISK_BYTES = 10 * GIB
"""Checkpoints of the largest shipped config: all that are kept, and one being written."""
FREE_MEMORY_BYTES = 2 * GIB
"""Memory of tokenizing or of one run beside the servers."""
CLOCK_SECONDS = 5.0
"""Clock difference that makes schedules and curves misleading."""
SCHEDULER_TIME = timedelta(minutes=2)
"""Prefect schedules the runs of a newly active schedule within a minute."""
TIMEOUT_SECONDS = 5.0
DEPLOY = "overnight up, or: prefect deploy --all"


@dataclass(frozen=True)
class Finding:
    what: str
    level: str
    found: str
    remedy: str = ""


def require(what: str, is_met: bool, found: str, remedy: str) -> Finding:
    """Return a fault with its remedy unless the requirement is met."""
    return Finding(what, GOOD, found) if is_met else Finding(what, FAULT, found, remedy)


def check_machine(settings: ServiceSettings, has_server: bool) -> Iterator[Finding]:
    """Yield all findings. `has_server`: `overnight up` runs, or PREFECT_API_URL is set."""
    yield check_python()
    yield from check_packages(requires("overnight") or [])
    yield check_gpu()
    yield from check_calibration(settings.root)
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
    is_met, remedy = required.contains(found), "recreate .venv with a newer Python"
    return require("Python", is_met, f"{found}, needs {required}", remedy)


def check_packages(requirements: Iterable[str]) -> Iterator[Finding]:
    """Check that every required package is installed in an allowed version."""
    parsed = [Requirement(text) for text in requirements]
    needed = [each for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})]
    is_met = True
    for each in needed:
        try:
            found = version(each.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not each.specifier.contains(found, prereleases=True):
            is_met = False
            remedy = f"pip install -c constraints.txt '{each.name}{each.specifier}'"
            yield Finding(each.name, FAULT, f"{found}, needs {each.specifier}", remedy)
    if is_met:
        main = ", ".join(f"{name} {version(name)}" for name in ("prefect", "mlflow", "torch"))
        yield Finding("packages", GOOD, f"{len(needed)} installed as required; {main}")


def check_gpu() -> Finding:
    name, driver = next(((gpu.name, gpu.driver) for gpu in installed_gpus()), ("", ""))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        known = "" if find_gpu(name) else "; not a known GPU, so MFU and hours are not estimated"
        found = f"{name}, driver {driver}, {free / GIB:.1f} of {total / GIB:.1f} GiB free{known}"
        remedy = "find the process with nvidia-smi and stop it"
        return require("GPU", free >= total / 2, found, remedy)
    if not name:
        remedy = "if there is a GPU, install NVIDIA's driver and check with nvidia-smi"
        return Finding("GPU", NOTE, "none: runs train on the CPU", remedy)
    remedy = f"update the driver to one for CUDA {torch.version.cuda} or newer"
    if torch.version.cuda is None:
        number = torch.__version__.split("+")[0]
        remedy = f"torch is a build for CPUs: pip install torch=={number}"
    found = f"{name}, driver {driver}, which torch {torch.__version__} cannot use"
    return Finding("GPU", FAULT, found, remedy)


def check_calibration(root: Path) -> Iterator[Finding]:
    """Check that hours rest on measurements of each GPU with its driver."""
    for card in installed_gpus():
        found, remedy = (
            f"{card.name}, driver {card.driver}",
            "for closer hours: overnight calibrate",
        )
        if read_calibration(root, card):
            yield Finding("calibration", GOOD, f"{found}: measured")
        else:
            yield Finding("calibration", NOTE, f"{found}: not measured yet", remedy)


def check_memory(available_bytes: int) -> Finding:
    found = f"{available_bytes / GIB:.1f} GiB free, needs {FREE_MEMORY_BYTES / GIB:.0f}"
    remedy = "stop other programs (top, then M), or lower data.workers"
    return require("memory", available_bytes >= FREE_MEMORY_BYTES, found, remedy)


def check_disk(root: Path) -> Finding:
    free = psutil.disk_usage(str(existing_ancestor(root))).free
    found = f"{free / GIB:.1f} GiB free below {root}, needs {FREE_DISK_BYTES / GIB:.0f}"
    remedy = "free some space, or set run.root to another disk"
    return require("disk", free >= FREE_DISK_BYTES, found, remedy)


def check_writable(root: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=existing_ancestor(root)):
            return Finding("folder", GOOD, f"{root} is writable")
    except OSError as error:
        remedy = "give the folder to the user that runs overnight (chown), or set another run.root"
        found = f"{root} is not writable: {error.strerror}"
        return Finding("folder", FAULT, found, remedy)


def check_file_times(root: Path) -> Finding:
    """Check that no file was written in the future, i.e. that the clock was not set back."""
    ahead = max((path.stat().st_mtime for path in root.glob("*/*")), default=0.0) - time.time()
    found = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}"
    if is_late := ahead >= CLOCK_SECONDS:
        found += f", but files below {root} are {timedelta(seconds=round(ahead))} newer"
    return require("clock", not is_late, found, "set the clock: timedatectl set-ntp true")


def check_tracking_store(uri: str) -> Finding:
    """Check that MLflow's server answers, or that its database can be read."""
    shown = redact_password(uri)
    try:
        if uri.startswith("http"):
            httpx.get(f"{uri}/health", timeout=TIMEOUT_SECONDS).raise_for_status()
        elif uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
            return Finding("MLflow", GOOD, f"{shown}, created by the first run")
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
        return Finding("MLflow", FAULT, f"{shown} does not work: {first_line(error)}", remedy)
    return Finding("MLflow", GOOD, shown)


def check_prefect_server(settings: ServiceSettings) -> Iterator[Finding]:
    """Check the server and, if it answers, what is deployed to it."""
    what, url = "Prefect's server", settings.api_url
    if not url.rstrip("/").endswith("/api"):
        remedy = f"export PREFECT_API_URL={url.rstrip('/')}/api"
        found = f"PREFECT_API_URL is {url}, which does not end in /api"
        yield Finding(what, FAULT, found, remedy)
        return
    try:
        answer = httpx.get(f"{url}/admin/version", timeout=TIMEOUT_SECONDS).raise_for_status()
    except httpx.HTTPError as error:
        remedy = "overnight up, or unset PREFECT_API_URL"
        yield Finding(what, FAULT, f"{url} does not answer: {first_line(error)}", remedy)
        return
    theirs, ours = answer.json(), version("prefect")
    is_same = theirs.split(".")[:2] == ours.split(".")[:2]
    remedy = f"use the same version on both sides: pip install prefect=={theirs}"
    yield require(what, is_same, f"{url} has version {theirs}, this machine {ours}", remedy)
    yield check_server_clock(answer.headers["date"])
    with get_client(sync_client=True) as client:
        yield from check_work_pool(client)
        yield check_runs(client, settings)
        yield from check_deployments(client, PROJECT)


def check_server_clock(date: str) -> Finding:
    """Compare this clock with a `Date` header, which has whole seconds."""
    ahead = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    found = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} Prefect's server"
    remedy = "set both clocks: timedatectl set-ntp true"
    return require("clock", abs(ahead) < CLOCK_SECONDS, found, remedy)


def check_work_pool(client: SyncPrefectClient) -> Iterator[Finding]:
    """Check the pool, and that a worker serves it."""
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        yield Finding("work pool", FAULT, f"{POOL} does not exist", "overnight up")
        return
    found = f"{POOL} has concurrency limit {pool.concurrency_limit}; one GPU needs 1"
    remedy = f"prefect work-pool set-concurrency-limit {POOL} 1"
    if pool.is_paused:
        found, remedy = f"{POOL} is paused", f"prefect work-pool resume {POOL}"
    is_met = pool.concurrency_limit == 1 and not pool.is_paused
    yield require("work pool", is_met, found, remedy)
    online = ", ".join(deployments.read_online_workers(client))
    found = f"online for {POOL}: {online}"
    if not online:
        found = f"none is online for {POOL}, so runs wait"
    yield require("worker", bool(online), found, "overnight up")


def check_runs(client: SyncPrefectClient, settings: ServiceSettings) -> Finding:
    running = deployments.read_running(client, settings.worker)
    found = f"running: {', '.join(run.name for run in running) or 'none'}"
    lost = [run.name for run in running if deployments.find_process(run) is None]
    if lost:
        found = f"without a process: {', '.join(lost)}"
    return require("runs", not lost, found, "stop `overnight up` and start it again: they resume")


def check_deployments(client: SyncPrefectClient, project: Path) -> Iterator[Finding]:
    """Check that the server has the deployments and schedules of prefect.yaml."""
    if not project.exists():
        found, remedy = f"no {project} in this folder", "change into the checkout"
        yield Finding("deployments", FAULT, found, remedy)
        return
    wanted = {each["name"]: each for each in yaml.safe_load(project.read_bytes())["deployments"]}
    deployed = {d.name: d for d in deployments.read_deployments(client)}
    missing = ", ".join(name for name in wanted if name not in deployed)
    found = f"missing: {missing}" if missing else f"all {len(wanted)} of {project}"
    yield require("deployments", not missing, found, DEPLOY)
    for name in wanted.keys() & deployed.keys():
        slugs = {each["slug"] for each in wanted[name].get("schedules", ())}
        yield from check_schedules(client, deployed[name], slugs)


def check_schedules(
    client: SyncPrefectClient, deployment: Any, slugs: set[str]
) -> Iterator[Finding]:
    what = f"schedule of {deployment.name}"
    for slug in slugs - {schedule.slug for schedule in deployment.schedules}:
        yield Finding(what, FAULT, f"{slug} is missing", DEPLOY)
    scheduled = FlowRunFilter.model_validate({"state": {"type": {"any_": ["SCHEDULED"]}}})
    own = DeploymentFilter.model_validate({"id": {"any_": [deployment.id]}})
    runs = client.read_flow_runs(flow_run_filter=scheduled, deployment_filter=own)
    times = (run.expected_start_time for run in runs if run.auto_scheduled)
    due = min((each for each in times if each), default=None)
    is_new = datetime.now(UTC) - deployment.updated < SCHEDULER_TIME
    when = "is active, but has no scheduled run"
    if due:
        when = f"next at {due.astimezone():%Y-%m-%d %H:%M %Z}"
    for schedule in deployment.schedules:
        cron = getattr(schedule.schedule, "cron", schedule.schedule)
        if not schedule.active:
            yield Finding(what, GOOD, f"{cron}, switched off")
        elif deployment.paused:
            found, remedy = f"{cron}, but the deployment is paused", "resume it on its page"
            yield Finding(what, FAULT, found, remedy)
        else:
            remedy = "pip install 'sqlalchemy<2.1' (newer ones silently schedule nothing), then "
            remedy += "start `overnight up` again"
            yield require(what, bool(due) or is_new, f"{cron} {when}", remedy)
