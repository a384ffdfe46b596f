"""Launch training on as many devices and machines as the config names.

One device trains in this process (`gpt.training.loop`). For more, torch's elastic launcher
(`torch.distributed.run`, c10d rendezvous) starts one process per device, and restarts all of them
from the last checkpoint if one is lost on any machine. The machine that `hardware.rendezvous` names
is the main machine: it keeps the records and writes the checkpoints. All machines must share
`run.root`.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.tokenize.pool import available_cpus
from gpt.errors import ConfigError, DistributedError, GPTError, Problem
from gpt.hardware.device import names_gpu
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.distributed.ipc import IPC_FOLDER, IPCServer
from gpt.training.distributed.process_group import IS_MAIN_MACHINE
from gpt.training.distributed.rendezvous import (
    find_interface,
    local_address,
    wait_for_main_machine,
)
from gpt.training.loop import never_stop, train
from gpt.training.metrics import StepRecord
from gpt.training.run_lock import run_lock

logger = logging.getLogger(__name__)

SPEC_FILE = "spec.json"
POLL_SECONDS = 0.2
SAVE_SECONDS = 15.0
"""For a last checkpoint; Prefect kills a flow run's processes 29 s after its SIGTERM."""
TERMINATE_SECONDS = 35.0
"""torch's launcher gives its processes 30 s after a SIGTERM."""
JOIN_SECONDS = 24 * 3600
"""How long machines wait for one another; one of them may have to be repaired first."""


class RunSpec(BaseModel):
    """What the main machine broadcasts to the others."""

    model_config = ConfigDict(frozen=True)

    dataset: DatasetManifest
    folder: Path
    sharding: str = "ddp"


class WorkerSpec(BaseModel):
    """What a worker process is started with; `run` is set on the main machine only."""

    model_config = ConfigDict(frozen=True)

    config: RunConfig
    run: RunSpec | None = None


def launch_training(
    config: RunConfig,
    dataset: DatasetManifest,
    folder: Path,
    stop: Callable[[], bool] = never_stop,
) -> Iterator[StepRecord]:
    """Train like `gpt.training.loop.train` on `hardware.devices` of `hardware.nodes` machines, with
    the same records, checkpoints and errors.

    After a restart of the group, the steps since its checkpoint are yielded again. Raises
    `ConfigError` if this machine has fewer GPUs, `DistributedError` after `hardware.restarts`.
    """
    if config.hardware.world_size == 1:
        yield from train(config, dataset, folder, stop)
        return
    _check_devices(config)
    sharding = config.hardware.sharding
    run = RunSpec(dataset=dataset, folder=folder.resolve(), sharding=sharding)
    with run_lock(folder):
        yield from launch_workers(WorkerSpec(config=config, run=run), folder / "group", stop)
    checkpoint = latest_checkpoint(folder)
    if not stop() and not (checkpoint and checkpoint.finished):
        raise _gave_up(config, folder / "group", "another machine stopped the run")


def join_training(config: RunConfig) -> None:
    """Train on this machine's devices for the run of the main machine at `hardware.rendezvous`,
    until the run ends. Waits for the main machine to start and, if it is lost, to come back.

    Raises `ConfigError` like `launch_training`, and the error that ends the run.
    """
    _check_devices(config)
    while True:
        wait_for_main_machine(config.hardware.rendezvous)
        try:
            for _ in launch_workers(WorkerSpec(config=config), config.run.root / "group"):
                pass
            return
        except DistributedError as error:  # cut off from the others
            logger.warning("%s", error.problems[0].rule)


def launch_workers(
    spec: WorkerSpec, logs: Path, stop: Callable[[], bool] = never_stop
) -> Iterator[StepRecord]:
    """Run this machine's workers with torch's launcher; yield their records on the main machine.
    The launcher and the workers write their output below `logs`."""
    reported_start = None
    with IPCServer() as server, _launcher(spec, server.folder, logs) as launcher:
        try:
            while True:
                has_ended = launcher.poll() is not None
                match server.receive(POLL_SECONDS):
                    case None if has_ended:
                        break
                    case StepRecord() as record:
                        yield record
                    case logging.LogRecord() as line:
                        logging.getLogger(line.name).handle(line)
                    case GPTError() as error:
                        raise error
                    case start, reason if start != reported_start:
                        logger.warning("a training process failed: %s", reason)
                        reported_start = start  # the others fail as a consequence
                if stop():
                    server.request_stop()
        except GPTError:
            raise
        except BaseException:  # the consumer closes the generator, or this process is interrupted
            if spec.run:  # leave a checkpoint; on other machines the run continues without this one
                server.request_stop()
                deadline = time.monotonic() + SAVE_SECONDS
                while launcher.poll() is None and time.monotonic() < deadline:
                    server.receive(POLL_SECONDS)
            raise
    if launcher.returncode and not stop():
        what = f"torch's launcher ended with exit code {launcher.returncode}"
        raise _gave_up(spec.config, logs, what)


@contextmanager
def _launcher(spec: WorkerSpec, folder: Path, logs: Path) -> Iterator[subprocess.Popen]:
    """Run torch's launcher; end it, and with it all processes of the group on this machine."""
    (folder / SPEC_FILE).write_text(spec.model_dump_json())
    logs.mkdir(parents=True, exist_ok=True)
    with (
        (logs / "launcher.log").open("ab") as log,
        subprocess.Popen(
            _command(spec, logs),
            env=_environment(spec, folder),
            stdin=subprocess.PIPE,  # inherited by the workers: it ends when this process does
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is handled by this process
        ) as launcher,
    ):
        try:
            yield launcher
        finally:
            launcher.terminate()
            try:
                launcher.wait(TERMINATE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(launcher.pid, signal.SIGKILL)


def _command(spec: WorkerSpec, logs: Path) -> list[str]:
    hardware = spec.config.hardware
    return [
        *(sys.executable, "-m", "gpt.gc_tuning", "torch.distributed.run"),
        *("--nnodes", str(hardware.nodes), "--nproc-per-node", str(hardware.devices)),
        *("--max-restarts", str(hardware.restarts), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", hardware.rendezvous or "127.0.0.1:0"),
        *("--rdzv-id", spec.config.run.name, "--local-addr", local_address(hardware.rendezvous)),
        *("--rdzv-conf", f"join_timeout={JOIN_SECONDS},is_host={int(spec.run is not None)}"),
        *("--log-dir", str(logs.resolve()), "--redirects", "3"),
        *("-m", "gpt.gc_tuning", "gpt.training.distributed.worker"),
    ]


def _environment(spec: WorkerSpec, folder: Path) -> dict[str, str]:
    hardware = spec.config.hardware
    interface = find_interface(local_address(hardware.rendezvous))
    threads = max(1, available_cpus() // hardware.devices)
    return {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": interface,
        # Otherwise torch 2.13 keeps one store for all starts, and a restart reads the ports of the
        # start before it (github.com/pytorch/pytorch/issues/167288).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **({"NCCL_SOCKET_IFNAME": interface} if hardware.rendezvous else {}),
        **os.environ,
        IPC_FOLDER: str(folder),
        IS_MAIN_MACHINE: "1" if spec.run else "0",
    }


def _check_devices(config: RunConfig) -> None:
    found, devices = torch.cuda.device_count(), config.hardware.devices
    if names_gpu(config.hardware.device) and found < devices:
        rule = f"torch {torch.__version__} finds {found} CUDA devices on this machine"
        remedy = f"set hardware.devices to at most {found}"
        raise ConfigError(Problem("hardware.devices", str(devices), rule, remedy))


def _gave_up(config: RunConfig, logs: Path, what: str) -> DistributedError:
    rule = f"{what}, after at most {config.hardware.restarts} restarts"
    remedy = f"see the last output of its processes in {logs}; re-run the command to resume"
    return DistributedError(Problem("hardware.devices", str(config.hardware.devices), rule, remedy))
