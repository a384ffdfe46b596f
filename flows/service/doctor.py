"""`overnight doctor`: what a night needs of this machine, each line good or with its remedy."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from packaging.requirements import Requirement
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound

from flows.service import deployments
from flows.service.supervisor import POOL, PROJECT, ServiceSettings, redact_password
from tasks.tracking.metadata import default_tracking_uri

GOOD, NOTE, FAULT = "good", "note", "FAULT"
FREE_DISK_BYTES = 10 * 2**30
"""Checkpoints of the largest shipped config, as many as are kept, and one being written."""
FREE_MEMORY_BYTES = 2 * 2**30
"""What tokenising and one run's process take beside the servers."""
CLOCK_SECONDS = 5.0
"""Difference to a server's clock from which schedules and curves mislead."""
SCHEDULER_SECONDS = 120.0
"""Prefect plans the runs of a schedule that was switched on within a minute."""
PATIENCE_SECONDS = 5.0
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


def check_machine(settings: ServiceSettings, serves: bool) -> Iterator[Finding]:
    """All findings, one by one. `serves`: there is a server to ask, of `overnight up` or of one
    that PREFECT_API_URL names."""
    yield python_version()
    yield from packages(requires("overnight") or [])
    yield graphics_card()
    yield memory(psutil.virtual_memory().available)
    yield disk(settings.root)
    yield writable(settings.root)
    yield tracking_store(default_tracking_uri(settings.root))
    yield clock_of_files(settings.root)
    if not serves:
        yield Finding(
            *("Prefect's server", NOTE, "none is running; `overnight run` needs none"),
            "for deployments and schedules: overnight up",
        )
        return
    yield from prefect_server(settings)


# --- the machine ---------------------------------------------------------------------------------


def python_version(found: str = platform.python_version()) -> Finding:
    wanted = Requirement(f"python{metadata('overnight')['Requires-Python']}").specifier
    if wanted.contains(found):
        return good("Python", found)
    return fault("Python", f"{found}, wanted {wanted}", "make .venv anew with a newer Python")


def packages(requirements: Iterable[str]) -> Iterator[Finding]:
    """Every package that is wanted: there, and of a version that is known to work."""
    named = [Requirement(text) for text in requirements]
    wanted = [each for each in named if each.marker is None or each.marker.evaluate({"extra": ""})]
    wrong = []
    for each in wanted:
        try:
            found = version(each.name)
        except PackageNotFoundError:
            found = "missing"
        if found == "missing" or not each.specifier.contains(found, prereleases=True):
            wrong.append(fault(each.name, f"{found}, wanted {each.specifier}", _install(each)))
    yield from wrong
    if not wrong:
        told = ", ".join(f"{name} {version(name)}" for name in ("prefect", "mlflow", "torch"))
        yield good("packages", f"{len(wanted)} as wanted; {told}")


def _install(wanted: Requirement) -> str:
    return f"pip install -c constraints.txt '{wanted.name}{wanted.specifier}'"


def graphics_card() -> Finding:
    import torch

    from gpt.hardware.gpus import find_gpu

    name, driver = _driver()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        known = "" if find_gpu(name) else "; not among the known cards, so no MFU and no hours"
        sizes = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        if free < total / 2:
            remedy = "nvidia-smi shows what holds it; end that before the night"
            return fault("GPU", f"{name}, driver {driver}, {sizes}", remedy)
        return good("GPU", f"{name}, driver {driver}, {sizes}{known}")
    if name:
        build = torch.version.cuda
        found = f"{name}, driver {driver}, which torch {torch.__version__} cannot use"
        if build is None:
            wanted = torch.__version__.split("+")[0]
            remedy = f"this is torch's build for CPUs: pip install torch=={wanted}"
            return fault("GPU", found, remedy)
        return fault("GPU", found, f"update the driver to one for CUDA {build} or newer")
    remedy = "is there a card? then install NVIDIA's driver (nvidia-smi shows it)"
    return Finding("GPU", NOTE, "none: runs train on the CPU", remedy)


def _driver() -> tuple[str, str]:
    """Name of the first card and version of the driver, as the driver tells; empty without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return str(pynvml.nvmlDeviceGetName(handle)), str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return "", ""


def memory(available_bytes: int) -> Finding:
    found = f"{available_bytes / 2**30:.1f} GiB free"
    if available_bytes >= FREE_MEMORY_BYTES:
        return good("memory", found)
    wanted = f"{found}, wanted {FREE_MEMORY_BYTES / 2**30:.0f}"
    return fault("memory", wanted, "end what holds it (top, then M), or lower data.workers")


def disk(root: Path) -> Finding:
    free = psutil.disk_usage(str(_existing(root))).free
    found = f"{free / 2**30:.1f} GiB free below {root}"
    if free >= FREE_DISK_BYTES:
        return good("disk", found)
    wanted = f"{found}, wanted {FREE_DISK_BYTES / 2**30:.0f}"
    return fault("disk", wanted, "make room, or set run.root to another disk")


def writable(root: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_existing(root)):
            return good("folder", f"{root} can be written to")
    except OSError as error:
        remedy = "give the folder to the user that runs overnight (chown), or set another run.root"
        return fault("folder", f"{root} cannot be written to: {error.strerror}", remedy)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def clock_of_files(root: Path) -> Finding:
    """Files that were written in the future say that the clock has been set back."""
    newest = max((path.stat().st_mtime for path in root.glob("*/*")), default=0.0)
    ahead = newest - time.time()
    now = datetime.now().astimezone()
    if ahead < CLOCK_SECONDS:
        return good("clock", f"{now:%Y-%m-%d %H:%M:%S %Z}")
    newer = timedelta(seconds=round(ahead))
    found = f"{now:%Y-%m-%d %H:%M}, but files below {root} are {newer} newer"
    return fault("clock", found, "set it: timedatectl set-ntp true")


def tracking_store(uri: str) -> Finding:
    """MLflow's server answers, or its database can be read."""
    shown = redact_password(uri)
    try:
        if uri.startswith("http"):
            httpx.get(f"{uri}/health", timeout=PATIENCE_SECONDS).raise_for_status()
        elif uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
            return good("MLflow", f"{shown}, made by the first run")
        else:
            _ask_database(uri)
    except Exception as error:  # of whatever database or network it is
        remedy = "start that server, or unset MLFLOW_TRACKING_URI"
        if uri.startswith("sqlite"):
            remedy = (
                "move that file away; `overnight sync RUN` fills a new store from the run folders"
            )
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return fault("MLflow", f"{shown} does not work: {reason}", remedy)
    return good("MLflow", shown)


def _ask_database(uri: str) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    with engine.connect() as connection:
        if uri.startswith("sqlite"):
            told = connection.execute(sqlalchemy.text("PRAGMA quick_check(1)")).scalar()
            if told != "ok":
                raise OSError(told)
        connection.execute(sqlalchemy.text("SELECT 1 FROM experiments LIMIT 1"))


# --- Prefect -------------------------------------------------------------------------------------


def prefect_server(settings: ServiceSettings) -> Iterator[Finding]:
    """The server, and where it answers what is deployed to it."""
    what, url = "Prefect's server", settings.api_url
    if not url.rstrip("/").endswith("/api"):
        remedy = f"export PREFECT_API_URL={url.rstrip('/')}/api"
        yield fault(what, f"PREFECT_API_URL is {url}, which does not end in /api", remedy)
        return
    try:
        answer = httpx.get(f"{url}/admin/version", timeout=PATIENCE_SECONDS)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        remedy = "overnight up, or unset PREFECT_API_URL"
        yield fault(what, f"{url} does not answer: {reason}", remedy)
        return
    served, ours = answer.json(), version("prefect")
    if served.split(".")[:2] == ours.split(".")[:2]:
        yield good(what, f"{url}, version {served}")
    else:
        remedy = f"use one version on both sides: pip install prefect=={served}"
        yield fault(what, f"{url} has version {served}, this machine {ours}", remedy)
    yield clock_of_server(answer.headers.get("date", ""))
    with deployments.api() as client:
        for check in (work_pool, worker, lost_runs):
            yield check(client, settings)
        yield from check_deployments(client, PROJECT)


def clock_of_server(date: str) -> Finding:
    """A `Date` header has whole seconds."""
    if not date:
        return Finding("clock", NOTE, "Prefect's server does not tell its own")
    ahead = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    if abs(ahead) < CLOCK_SECONDS:
        return good("clock", "as Prefect's server has it")
    found = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} Prefect's server"
    return fault("clock", found, "set both: timedatectl set-ntp true")


def work_pool(client: SyncPrefectClient, settings: ServiceSettings) -> Finding:
    remedy = "overnight up"
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        return fault("work pool", f"there is none called {POOL}", remedy)
    if pool.is_paused:
        return fault("work pool", f"{POOL} is paused", f"prefect work-pool resume {POOL}")
    if pool.concurrency_limit != 1:
        room = pool.concurrency_limit or "any number of"
        found = f"{POOL} has room for {room} runs, one GPU for one"
        return fault("work pool", found, f"prefect work-pool set-concurrency-limit {POOL} 1")
    return good("work pool", f"{POOL}, one run at a time")


def worker(client: SyncPrefectClient, settings: ServiceSettings) -> Finding:
    try:
        online = deployments.read_online_workers(client)
    except ObjectNotFound:
        online = []
    if online:
        return good("worker", f"{', '.join(online)} takes runs from {POOL}")
    return fault("worker", f"none takes runs from {POOL}, so whatever is due waits", "overnight up")


def lost_runs(client: SyncPrefectClient, settings: ServiceSettings) -> Finding:
    held = deployments.running(client, settings.worker)
    lost = [run for run in held if deployments.find_process(run) is None]
    if not lost:
        told = ", ".join(run.name for run in held) or "none"
        return good("runs", f"going on now: {told}")
    found = f"{', '.join(run.name for run in lost)} held for running, but without a process"
    return fault("runs", found, "stop `overnight up` and start it again: they go on")


def check_deployments(client: SyncPrefectClient, project: Path) -> Iterator[Finding]:
    """Deployments and schedules of prefect.yaml, as the server has them."""
    if not project.exists():
        yield fault("deployments", f"no {project} in this folder", "change into the checkout")
        return
    wanted = yaml.safe_load(project.read_text(encoding="utf-8"))["deployments"]
    there = {d.name: d for d in deployments.deployed(client)}
    missing = [each["name"] for each in wanted if each["name"] not in there]
    if missing:
        yield fault(
            "deployments",
            f"missing: {', '.join(missing)}",
            DEPLOY,
        )
    else:
        yield good("deployments", f"all {len(wanted)} of {project}")
    for each in wanted:
        if each["name"] in there:
            yield from schedules(client, there[each["name"]], each.get("schedules", []))


def schedules(
    client: SyncPrefectClient, deployment: Any, wanted: Iterable[dict[str, Any]]
) -> Iterator[Finding]:
    what = f"schedule of {deployment.name}"
    slugs = {schedule.slug for schedule in deployment.schedules}
    for each in wanted:
        if each["slug"] not in slugs:
            yield fault(what, f"{each['slug']} is missing", DEPLOY)
    for schedule in deployment.schedules:
        cron = getattr(schedule.schedule, "cron", schedule.schedule)
        if not schedule.active:
            yield good(what, f"{cron}, switched off")
            continue
        if deployment.paused:
            yield fault(what, f"{cron}, but the deployment is paused", "resume it on its page")
        elif due := _next_run(client, deployment):
            yield good(what, f"{cron}, next at {due.astimezone():%Y-%m-%d %H:%M %Z}")
        else:
            remedy = "pip install 'sqlalchemy<2.1' (newer ones silently plan nothing), then "
            remedy += "start `overnight up` again"
            yield fault(what, f"{cron} is on, but no run of it is planned", remedy)


def _next_run(client: SyncPrefectClient, deployment: Any) -> datetime | None:
    """When the next planned run is due; waits for Prefect to plan one where the schedule is new."""
    planned = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
    )
    of_it = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))

    def look() -> datetime | None:
        runs = client.read_flow_runs(flow_run_filter=planned, deployment_filter=of_it)
        times = [run.expected_start_time for run in runs if run.auto_scheduled]
        return min((each for each in times if each), default=None)

    changed = deployment.updated or datetime.now(UTC)
    return _waited(look, (changed - datetime.now(UTC)).total_seconds() + SCHEDULER_SECONDS)


def _waited(look: Callable[[], datetime | None], seconds: float) -> datetime | None:
    end = time.monotonic() + seconds
    while (found := look()) is None and time.monotonic() < end:
        time.sleep(1.0)
    return found
