"""Two machines train one model with the command line on both; one loses its network and gets it
back, then is stopped and started again. The machines are network namespaces with a link between."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import wait_for

from gpt.training.checkpoint.retention import latest_checkpoint
from tasks.tracking.journal import MetricsJournal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
ADDRESSES = ("10.213.7.1", "10.213.7.2")
STEPS = 60


@dataclass
class Host:
    """A network namespace (`ip netns`) on the same disk."""

    name: str
    link: str

    def command(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]

    def plug(self, state: str) -> None:
        subprocess.run(self.command("ip", "link", "set", self.link, state), check=True)

    def overnight(self, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        with log.open("wb") as output:
            return subprocess.Popen(
                self.command(sys.executable, "-m", "flows.cli.main", *arguments),
                cwd=ROOT,
                env=outside | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    tag = f"on{os.getpid() % 100_000}"
    both = Host(f"{tag}a", f"{tag}a"), Host(f"{tag}b", f"{tag}b")
    commands = [f"ip netns add {host.name}" for host in both]
    commands += [f"ip link add {both[0].link} type veth peer name {both[1].link}"]
    for host, address in zip(both, ADDRESSES, strict=True):
        commands += [
            f"ip link set {host.link} netns {host.name}",
            f"ip -n {host.name} addr add {address}/24 dev {host.link}",
            f"ip -n {host.name} link set {host.link} up",
            f"ip -n {host.name} link set lo up",
        ]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield both
    finally:
        for host in both:
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def has_logged(log: Path, what: str) -> Callable[[], bool]:
    return lambda: what in log.read_text()


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2's ip"
)
def test_host_that_loses_its_network_or_is_stopped_rejoins(
    tmp_path: Path, tiny_config: Path, hosts: tuple[Host, Host]
) -> None:
    root = tmp_path / "runs"
    settings = {
        "run.root": root,
        "run.name": "two-hosts",
        "training.max_steps": STEPS,
        "training.grad_acc": 4,
        "training.checkpoint_interval": 10,
        "evaluation.interval": 1_000,
        "hardware.device": "cpu",
        "hardware.devices": 2,
        "hardware.nodes": 2,
        "hardware.rendezvous": f"{ADDRESSES[0]}:29400",
        "hardware.timeout_seconds": 5,
    }
    overrides = itertools.chain(*(("--set", f"{k}={v}") for k, v in settings.items()))
    arguments = ["run", str(tiny_config), *overrides]
    logs = [tmp_path / f"{name}.log" for name in "abc"]
    processes = [host.overnight(log, *arguments) for host, log in zip(hosts, logs[:2], strict=True)]
    try:
        wait_for(
            "the main machine", has_logged(logs[1], f"the main machine at {ADDRESSES[0]}:29400")
        )
        (folder,) = wait_for("a run", lambda: list(root.glob("train/*")))
        wait_for("a checkpoint", lambda: latest_checkpoint(folder))
        hosts[1].plug("down")
        wait_for("the loss of a process", has_logged(logs[0], "a training process failed"))
        before = latest_checkpoint(folder)
        assert before
        assert not before.finished
        hosts[1].plug("up")
        restarted = f"all processes restarted from step {before.step}"
        wait_for("both", has_logged(logs[0], restarted))

        # Ctrl-C on the machine that is not the main one.
        processes[1].send_signal(signal.SIGINT)
        assert processes[1].wait(60) == 130, logs[1].read_text()
        assert processes[0].poll() is None, logs[0].read_text()
        processes[1] = hosts[1].overnight(logs[2], *arguments)
        for process, log in zip(processes, (logs[0], logs[2]), strict=True):
            assert process.wait(180) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
    assert logs[0].read_text().count("all processes restarted") >= 2
    assert "the run has ended" in logs[2].read_text()
    assert "Traceback" not in "".join(log.read_text() for log in logs)
    finished = latest_checkpoint(folder)
    assert finished
    assert finished.finished
    steps = [
        json.loads(line)["step"] for line in MetricsJournal(folder).path.read_text().splitlines()
    ]
    assert set(steps) >= set(range(1, STEPS + 1))
