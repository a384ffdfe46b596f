"""Training on as many devices and machines as the config names.

One device trains in this process (`gpt.training.loop`). For more, torch's elastic launcher
(`torch.distributed.run`, c10d rendezvous) starts one process a device and starts all of them again
from the last checkpoint when one is lost, on whichever machine. The machine that `rendezvous` names
leads: it keeps the records and writes the checkpoints. All of them must see `run.root`.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.tokenize.pool import available_cpus
from gpt.errors import ConfigError, DistributedError, GPTError, Problem
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.distributed.ipc import IPC_ADDRESS, IPCServer
from gpt.training.distributed.process_group import IS_MAIN_MACHINE
from gpt.training.distributed.rendezvous import (
    find_interface,
    is_main_machine,
    local_address,
    wait_for_main_machine,
)
from gpt.training.loop import StepRecord, never_stop, train
from gpt.training.run_lock import run_lock

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
LEAVE_SECONDS = 15.0
"""For a checkpoint; Prefect kills what is still there 29 s after its SIGTERM."""
TERMINATE_SECONDS = 35.0
"""torch gives its processes 30 s after a SIGTERM."""
JOIN_SECONDS = 24 * 3600
"""How long machines wait for one another: one of them may be mended first."""


class RunSpec(BaseModel):
    """What the leading machine tells the others."""

    model_config = ConfigDict(frozen=True)

    dataset: DatasetManifest
    folder: Path


class WorkerSpec(BaseModel):
    """What a process is started with."""

    model_config = ConfigDict(frozen=True)

    config: RunConfig
    work: RunSpec | None = None
    """Where this machine leads."""


@dataclass(frozen=True)
class GroupStarted:
    """The group stands at this step, and trains on from there."""

    step: int


@dataclass(frozen=True)
class WorkerFailed:
    """A process of the group ended by an error that another attempt may mend."""

    reason: str


def launch_training(
    config: RunConfig,
    dataset: DatasetManifest,
    folder: Path,
    stop: Callable[[], bool] = never_stop,
) -> Iterator[StepRecord]:
    """`gpt.training.loop.train` on `hardware.devices` of `hardware.nodes` machines: the same
    records, checkpoints and errors, whatever their number.

    After a restart of the group steps since its checkpoint are told again. Raises `ConfigError`
    where this machine has fewer GPUs, `DistributedError` after `hardware.restarts`.
    """
    if config.hardware.devices * config.hardware.nodes == 1:
        yield from train(config, dataset, folder, stop)
        return
    _refuse_missing_devices(config)
    task = WorkerSpec(config=config, work=RunSpec(dataset=dataset, folder=folder.resolve()))
    with run_lock(folder):
        yield from launch_workers(task, folder / "group", stop)
    checkpoint = latest_checkpoint(folder)
    if not stop() and not (checkpoint and checkpoint.finished):
        raise _gave_up(config, folder / "group", "another machine stopped it")


def join_training(config: RunConfig) -> None:
    """Lend this machine's devices to the run that the machine at `hardware.rendezvous` leads, until
    that ends; waits for it, and for it to come back. Raises `ConfigError` as `launch_training`, and
    what ends the run."""
    _refuse_missing_devices(config)
    while True:
        wait_for_main_machine(config.hardware.rendezvous)
        try:
            for _ in launch_workers(WorkerSpec(config=config), config.run.root / "group"):
                pass
            return
        except DistributedError as error:  # cut off from the others
            logger.warning("%s", error.problems[0].rule)


def launch_workers(
    task: WorkerSpec, logs: Path, stop: Callable[[], bool] = never_stop
) -> Iterator[StepRecord]:
    """This machine's part of a run, through torch's launcher: its records, where it leads. What the
    launcher and its processes say goes below `logs`."""
    told = _Told()
    with _line() as line, _launcher(task, line, logs) as launcher:
        try:
            while launcher.poll() is None or line.has_clients:
                for message in line.messages(POLL_SECONDS):
                    if isinstance(message, StepRecord):
                        yield message
                    else:
                        told.take(message)
                if stop():
                    line.request_stop()
        except GPTError:
            raise
        except BaseException:  # whoever reads this leaves
            if task.work:  # not without a checkpoint; where another machine leads, the run goes on
                line.request_stop()
                with suppress(subprocess.TimeoutExpired):
                    launcher.wait(LEAVE_SECONDS)
            raise
    if launcher.returncode and not stop():
        raise _gave_up(task.config, logs, f"torch's launcher ended with {launcher.returncode}")


class _Told:
    """What is made of messages that are no records."""

    def __init__(self) -> None:
        self._starts, self._end_told = 0, False

    def take(self, message: logging.LogRecord | GroupStarted | WorkerFailed | GPTError) -> None:
        match message:
            case logging.LogRecord():
                logging.getLogger(message.name).handle(message)
            case GroupStarted(step):
                if self._starts:
                    logger.warning("all devices started again, after step %d", step)
                self._starts, self._end_told = self._starts + 1, False
            case WorkerFailed(reason):
                if not self._end_told:  # the others follow
                    logger.warning("the process of a device ended: %s", reason)
                self._end_told = True
            case GPTError():
                raise message


@contextmanager
def _line() -> Iterator[IPCServer]:
    line = IPCServer()
    try:
        yield line
    finally:
        line.close()


@contextmanager
def _launcher(task: WorkerSpec, line: IPCServer, logs: Path) -> Iterator[subprocess.Popen]:
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="overnight-") as folder:
        path = Path(folder, "task.json")
        path.write_text(task.model_dump_json())
        with (logs / "launcher.log").open("ab") as log:
            launcher = subprocess.Popen(
                [*_command(task.config, logs), str(path)],
                env=_environment(task, line),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for whoever started this
            )
        try:
            yield launcher
        finally:
            _end(launcher)


def _command(config: RunConfig, logs: Path) -> list[str]:
    hardware = config.hardware
    return [
        *(sys.executable, "-m", "gpt.gc_tuning", "torch.distributed.run"),
        *("--nnodes", str(hardware.nodes), "--nproc-per-node", str(hardware.devices)),
        *("--max-restarts", str(hardware.restarts), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", hardware.rendezvous or "127.0.0.1:0"),
        *("--rdzv-id", config.run.name, "--local-addr", local_address(hardware.rendezvous)),
        *(
            "--rdzv-conf",
            f"join_timeout={JOIN_SECONDS},is_host={int(is_main_machine(hardware.rendezvous))}",
        ),
        *("--log-dir", str(logs.resolve()), "--redirects", "3"),
        *("-m", "gpt.gc_tuning", "gpt.training.distributed.worker"),
    ]


def _environment(task: WorkerSpec, line: IPCServer) -> dict[str, str]:
    hardware = task.config.hardware
    interface = find_interface(local_address(hardware.rendezvous))
    threads = max(1, available_cpus() // hardware.devices)
    return {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": interface,
        # Else torch 2.13 keeps one store for all starts, and a new one meets the last one's ports
        # (github.com/pytorch/pytorch/issues/167288).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **({"NCCL_SOCKET_IFNAME": interface} if hardware.rendezvous else {}),
        **os.environ,
        IPC_ADDRESS: line.address,
        IS_MAIN_MACHINE: "1" if task.work else "0",
    }


def _end(launcher: subprocess.Popen) -> None:
    """Of whatever is still there of the group on this machine."""
    if launcher.poll() is None:
        launcher.terminate()
        try:
            launcher.wait(TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()


def _refuse_missing_devices(config: RunConfig) -> None:
    found, wanted = torch.cuda.device_count(), config.hardware.devices
    on_gpu = config.hardware.device.startswith("cuda") or (
        config.hardware.device == "auto" and found
    )
    if on_gpu and found < wanted:
        rule = f"torch {torch.__version__} sees {found} CUDA devices on this machine"
        remedy = f"set hardware.devices to at most {found}"
        raise ConfigError(Problem("hardware.devices", str(wanted), rule, remedy))


def _gave_up(config: RunConfig, logs: Path, what: str) -> DistributedError:
    rule = f"{what}, after at most {config.hardware.restarts} new starts"
    remedy = f"what its processes said last is in {logs}; the same command goes on"
    return DistributedError(Problem("hardware.devices", str(config.hardware.devices), rule, remedy))
