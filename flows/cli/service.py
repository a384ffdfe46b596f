"""The commands about servers and the machine: up, watch, doctor, calibrate, sync."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import Json, Root, display_path
from flows.runtime.environment import prepare
from gpt.errors import Problem, ServiceError

app = typer.Typer(rich_markup_mode=None)

ServiceRoot = Annotated[
    Path, typer.Option("--root", envvar="OVERNIGHT_ROOT", help="Folder of all runs (run.root).")
]


@app.command()
def up(
    root: ServiceRoot = Path("runs"),
    host: Annotated[
        str, typer.Option(envvar="OVERNIGHT_HOST", help="Address to listen on.")
    ] = "127.0.0.1",
    prefect_port: Annotated[
        int, typer.Option(envvar="OVERNIGHT_PREFECT_PORT", help="Port of Prefect's server.")
    ] = 4200,
    mlflow_port: Annotated[
        int, typer.Option(envvar="OVERNIGHT_MLFLOW_PORT", help="Port of MLflow's server.")
    ] = 5000,
) -> None:
    """Start Prefect, MLflow and a worker, and deploy all flows.

    Ctrl-C stops everything. If PREFECT_API_URL or MLFLOW_TRACKING_URI names a server, that one is
    used.
    """
    from flows.service.settings import PROJECT, ServiceSettings

    if not PROJECT.exists():
        rule = "is not in this folder, so there is nothing to deploy"
        remedy = "change into the checkout of overnight"
        raise ServiceError(Problem(str(PROJECT), str(Path.cwd()), rule, remedy))
    settings = ServiceSettings(root, host, prefect_port, mlflow_port)
    os.environ |= settings.environment  # before Prefect reads it
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    from flows.service.up import up as start

    start(settings)


@app.command()
def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to watch.")],
    interval: Annotated[
        float,
        typer.Option(
            min=0.1, help="Seconds between scans; a file must not change between two scans."
        ),
    ] = 10.0,
    pattern: Annotated[
        str, typer.Option(help="Pattern of file names, at any depth.")
    ] = "*.parquet",
    existing: Annotated[
        bool, typer.Option("--existing", help="Include files that exist at the first start.")
    ] = False,
    root: Root = Path("runs"),
) -> None:
    """Start a retraining for each new Parquet file in a folder.

    Sends an event to the Prefect server per complete new file; a deployment reacts to it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        prepare(root)
        from flows.service.watch import watch as watch_folder

        watch_folder(directory, pattern, interval, existing, root)
    except KeyboardInterrupt:
        print("\nstopped watching; re-run the same command to resume", file=sys.stderr)


@app.command()
def doctor(root: ServiceRoot = Path("runs"), as_json: Json = False) -> None:
    """Check that this machine is ready to train overnight.

    Exits with code 1 if it is not.
    """
    prepare(root)
    has_server = "PREFECT_API_URL" in os.environ
    from flows.service.doctor import FAULT, check_machine
    from flows.service.settings import ServiceSettings

    findings = []
    for finding in check_machine(ServiceSettings(root), has_server):
        findings.append(finding)
        if not as_json:
            print(f"{finding.level:5}  {finding.what}: {finding.found}", flush=True)
            if finding.remedy:
                print(f"       -> {finding.remedy}", flush=True)
    if as_json:
        print(json.dumps([vars(finding) for finding in findings], indent=2))
    if any(finding.level == FAULT for finding in findings):
        raise typer.Exit(1)


@app.command()
def calibrate(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again, although the driver is the same.")
    ] = False,
    root: Root = Path("runs"),
) -> None:
    """Measure this machine's GPU to estimate its hours.

    Takes about three minutes. Shows the last result while the driver stays the same.
    """
    prepare(root)
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from gpt.hardware.calibration import read_calibration, write_calibration
    from gpt.hardware.device import describe_device, pick_device
    from gpt.hardware.gpus import find_gpu
    from gpt.preflight.calibration import compare_measurement
    from gpt.training.calibration import measure_card

    chosen = pick_device(device)
    card = describe_device(chosen)
    gpu = find_gpu(card.name, card.memory_bytes)
    stored = () if fresh else read_calibration(root, card)
    console, measured = Console(highlight=False, soft_wrap=True), []
    console.print(f"{card.name}, driver {card.driver}")
    with TemporaryDirectory() as folder, console.status("measuring, about three minutes"):
        for each in stored or measure_card(chosen, Path(folder), is_small=chosen.type == "cpu"):
            for name, value, comparison in compare_measurement(each, gpu):
                console.print(f"  {name:<30} {value:>18}  {comparison}", markup=False)
            measured.append(each)
    if not stored:
        write_calibration(root, card, tuple(measured))


@app.command()
def sync(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of a run.")],
    root: Root = Path("runs"),
    uri: Annotated[str, typer.Option("--uri", help="MLflow server (default: the run's own).")] = "",
) -> None:
    """Upload a run's metrics, files and status to MLflow.

    Uploads only what MLflow does not have yet.
    """
    from gpt.training.run_dir import find_run_dir_by_name

    folder = find_run_dir_by_name(run, root)
    prepare(root)
    from gpt.training.run_lock import run_lock
    from tasks.tracking.runs import sync_run

    with run_lock(folder):
        uploaded = sync_run(folder, uri)
    print(f"{display_path(folder.resolve())}: {uploaded}")
