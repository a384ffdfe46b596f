"""Stopped from outside, wherever it stands: quickly, said, resumable; through the real command."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from fault_at import PLACES
from overnight_command import (
    OWN_API,
    command,
    flow_states,
    last_state,
    mlflow_run,
)
from prefect.settings import PREFECT_API_URL

from gpt.training.checkpoint.retention import latest_checkpoint
from tasks.runtime.signals import StopRequested, StopSignals

"""Where the command starts Prefect's API itself; elsewhere the suite's server saves that time."""


@pytest.mark.usefixtures("prefect_server")
def test_stopped_at_every_place_one_run_comes_to_its_end(tiny_config: Path, new_root: Path) -> None:
    """One run, stopped at one place after the other: in training by Ctrl-C, elsewhere by SIGTERM,
    each to all its processes."""
    root = new_root
    arguments = ["run", str(tiny_config), "--set", f"run.root={root}"]
    for place in PLACES:
        fault = "interrupt" if place == "training" else "stop"
        number = signal.SIGINT if fault == "interrupt" else signal.SIGTERM
        server = {} if place in OWN_API else {"PREFECT_API_URL": PREFECT_API_URL.value()}
        process = command("tests/helpers/fault_at.py", fault, place, *arguments, **server)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 128 + number, (place, output)
        assert f"stopped by {number.name}" in output, place
        assert "re-run the same command" in output, place
        assert "Traceback" not in output, place
        assert last_state(root, place) == "CANCELLED", place
        if place != "tokenising":
            assert mlflow_run(root)[1].info.status == "KILLED", place
            (folder,) = (root / "train").iterdir()
            checkpoint = latest_checkpoint(folder)
            assert f"after step {checkpoint.step if checkpoint else 0};" in output, place
    assert "after step 12;" in output
    process = command("-m", "flows.cli.main", *arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert flow_states(root)[-1] == "COMPLETED"
    client, run = mlflow_run(root)
    assert run.info.status == "FINISHED"
    for key, steps in {"train/loss": range(1, 13), "val/loss": [0, 6, 12]}.items():
        points = client.get_metric_history(run.info.run_id, key)
        assert [point.step for point in points] == list(steps), key
    # Once more: told in a second, without Prefect.
    process = command("-m", "flows.cli.main", *arguments)
    again, _ = process.communicate(timeout=120)
    assert "already finished at step 12" in again
    assert again.splitlines()[-1] == output.splitlines()[-1]
    assert len(flow_states(root)) == len(OWN_API) + 1


class TestStopping:
    """The handlers themselves, with signals that this process sends itself."""

    def test_outside_of_training_it_raises_at_once_and_puts_the_handlers_back(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with StopSignals() as stopping:
            with pytest.raises(StopRequested, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stopping.requested()
        assert signal.getsignal(signal.SIGTERM) is before

    @staticmethod
    def trained(stopping: StopSignals, *signals: int, seconds: float = 0.0) -> bool:
        """Whether the training, which gets these signals, came to its own end."""
        ended = False
        try:
            with stopping.graceful_stop():
                for number in signals:
                    os.kill(os.getpid(), number)
                time.sleep(seconds)
                ended = stopping.requested()
        except StopRequested:
            return ended
        raise AssertionError("nobody was told of the stop")

    def test_training_comes_to_its_own_end(self) -> None:
        with StopSignals() as stopping:
            assert self.trained(stopping, signal.SIGINT)

    def test_the_same_signal_twice_at_once_is_one(self) -> None:
        with StopSignals() as stopping:
            assert self.trained(stopping, signal.SIGTERM, signal.SIGTERM)

    def test_what_takes_too_long_is_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tasks.runtime.signals.GRACE_SECONDS", 0.2)
        monkeypatch.setattr("tasks.runtime.signals.REPEATED_SECONDS", 0.1)
        with StopSignals() as stopping:
            assert not self.trained(stopping, signal.SIGTERM, seconds=60.0)
