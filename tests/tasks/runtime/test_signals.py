"""Signals stop the real command at any stage: quickly, with a message, resumable."""

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
from waiting import scaled

from gpt.training.checkpoint.retention import latest_checkpoint
from tasks.runtime.signals import StopRequested, StopSignals


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_run_stopped_at_every_stage_completes(tiny_config: Path, new_root: Path) -> None:
    """Stop one run at one place after another: in training by Ctrl-C, elsewhere by SIGTERM, each
    sent to all its processes."""
    root = new_root
    arguments = ["run", str(tiny_config), "--set", f"run.root={root}"]
    for place in PLACES:
        fault = "interrupt" if place == "training" else "stop"
        number = signal.SIGINT if fault == "interrupt" else signal.SIGTERM
        server = {} if place in OWN_API else {"PREFECT_API_URL": PREFECT_API_URL.value()}
        process = command("tests/helpers/fault_at.py", fault, place, *arguments, **server)
        output, _ = process.communicate(timeout=scaled(60))
        assert process.returncode == 128 + number, (place, output)
        assert f"stopped by {number.name}" in output, place
        assert "re-run the same command" in output, place
        assert "Traceback" not in output, place
        assert last_state(root, place) == "CANCELLED", place
        if place != "tokenizing":
            assert mlflow_run(root)[1].info.status == "KILLED", place
            (folder,) = (root / "train").iterdir()
            checkpoint = latest_checkpoint(folder)
            assert f"after step {checkpoint.step if checkpoint else 0};" in output, place
    assert "after step 12;" in output
    process = command("-m", "flows.cli.main", *arguments)
    output, _ = process.communicate(timeout=scaled(60))
    assert process.returncode == 0, output
    assert flow_states(root)[-1] == "COMPLETED"
    client, run = mlflow_run(root)
    assert run.info.status == "FINISHED"
    for key, steps in {"train/loss": range(1, 13), "val/loss": [0, 6, 12]}.items():
        points = client.get_metric_history(run.info.run_id, key)
        assert [point.step for point in points] == list(steps), key
    # A finished run is reported without Prefect.
    process = command("-m", "flows.cli.main", *arguments)
    again, _ = process.communicate(timeout=scaled(60))
    assert "already finished at step 12" in again
    assert again.splitlines()[-1] == output.splitlines()[-1]
    assert len(flow_states(root)) == len(OWN_API) + 1


class TestStopSignals:
    """The handlers, with signals that this process sends to itself."""

    def test_signal_raises_outside_of_training_and_handlers_are_restored(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with StopSignals() as stop_signals:
            with pytest.raises(StopRequested, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop_signals.requested()
        assert signal.getsignal(signal.SIGTERM) is before

    @staticmethod
    def finishes_block(stop_signals: StopSignals, *signals: int, seconds: float = 0.0) -> bool:
        """Return whether a block that receives these signals returns by itself."""
        ended = False
        try:
            with stop_signals.graceful_stop():
                for number in signals:
                    os.kill(os.getpid(), number)
                time.sleep(seconds)
                ended = stop_signals.requested()
        except StopRequested:
            return ended
        raise AssertionError("StopRequested was not raised")

    def test_training_finishes_its_step(self) -> None:
        with StopSignals() as stop_signals:
            assert self.finishes_block(stop_signals, signal.SIGINT)

    def test_repeated_signal_counts_once(self) -> None:
        with StopSignals() as stop_signals:
            assert self.finishes_block(stop_signals, signal.SIGTERM, signal.SIGTERM)

    def test_slow_block_is_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tasks.runtime.signals.GRACE_SECONDS", 0.2)
        monkeypatch.setattr("tasks.runtime.signals.REPEATED_SECONDS", 0.1)
        with StopSignals() as stop_signals:
            assert not self.finishes_block(stop_signals, signal.SIGTERM, seconds=60.0)
