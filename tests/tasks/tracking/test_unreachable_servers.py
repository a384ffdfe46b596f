"""MLflow or Prefect unreachable, with real servers: the run continues and loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from overnight_command import command, flow_states, mlflow_run
from servers import MlflowServer, with_store
from training_data import make_token_dataset, small_config
from waiting import free_port, scaled

from gpt.config.schema import RunConfig
from gpt.training.metrics import StepRecord
from gpt.training.run_dir import open_run_dir
from tasks.tracking import journal
from tasks.tracking.mlflow_api import MlflowClient
from tasks.tracking.runs import RunRef, open_recorder, open_run, track_run_status

pytestmark = pytest.mark.slow


def opened(tmp_path: Path, uri: str) -> tuple[RunConfig, RunRef]:
    config = small_config(tmp_path)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    dataset = make_token_dataset(tmp_path / "tokens")
    return config, open_run(config, dataset, open_run_dir(config, dataset))


def record(step: int) -> StepRecord:
    return StepRecord(step, step * 100, 1e-3, loss=1 / step, grad_norm=1.0)


def losses(uri: str) -> list[tuple[int, float]]:
    client = MlflowClient(uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "overnight"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    return [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, "train/loss")]


EXPECTED = [(step, 1 / step) for step in range(1, 61)]


def test_restarted_server_receives_every_point_once(tmp_path: Path, server: MlflowServer) -> None:
    _, run = opened(tmp_path, server.uri)
    with track_run_status(run), open_recorder(run) as recorder:
        for step in range(1, 61):
            recorder.log_step(record(step))
            if step == 10:
                server.kill()
            if step == 40:
                server.start()
    assert losses(server.uri) == EXPECTED


def test_sync_sends_a_run_to_a_new_server(
    tmp_path: Path,
    server: MlflowServer,
    mlflow_database: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, run = opened(tmp_path, server.uri)
    with track_run_status(run), open_recorder(run) as recorder:
        for step in range(1, 61):
            recorder.log_step(record(step))
            if step == 10:
                server.kill()
    assert f"overnight sync {run.folder}" in capsys.readouterr().out
    words = ("-m", "flows.cli.main", "sync", run.folder.name, "--root", str(tmp_path))
    failing = command(*words)
    output, _ = failing.communicate(timeout=scaled(60))
    assert failing.returncode == 2
    assert "cannot be reached" in output
    assert "Traceback" not in output
    new = MlflowServer(with_store(tmp_path / "new", mlflow_database))
    new.start()
    try:
        outputs = [
            command(*words, "--uri", new.uri).communicate(timeout=scaled(60))[0] for _ in range(2)
        ]
        assert "sent 60 steps" in outputs[0]
        assert "is already up to date" in outputs[1]
        assert losses(new.uri) == EXPECTED
    finally:
        new.kill()
        server.start()


def test_sync_of_an_unknown_run_fails(tmp_path: Path) -> None:
    process = command("-m", "flows.cli.main", "sync", "unknown", "--root", str(tmp_path))
    output, _ = process.communicate(timeout=scaled(60))
    assert process.returncode == 2
    assert "RUN = unknown" in output
    assert "Traceback" not in output


def test_full_disk_loses_no_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three writes are incomplete, as on a full disk."""
    writes = 0

    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            nonlocal writes
            writes += 1
            return self.file.write(data[: len(data) // 2] if writes % 3 else data)

    metrics = journal.MetricsJournal(tmp_path)
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Full(real(self, *a, **k)))
    refused = 0
    for step in range(1, 31):
        try:
            metrics.append(step, {"loss": float(step)})
        except OSError:
            refused += 1
    monkeypatch.undo()
    assert refused == 20
    lines, _ = journal.read_metrics(tmp_path / journal.METRICS_FILE)
    assert [(line.step, line.metrics) for line in lines] == [
        (step, {"loss": float(step)}) for step in range(1, 31)
    ]
    # A restarted run repeats a step that is already there.
    assert not journal.MetricsJournal(tmp_path).append(30, {"loss": 0.0})


@pytest.mark.parametrize("fault", ["kill prefect", "hang prefect"])
def test_run_survives_loss_of_prefect_api(tiny_config: Path, new_root: Path, fault: str) -> None:
    root = new_root
    arguments = ["run", str(tiny_config), "--set", f"run.root={root}"]
    process = command(
        *("tests/helpers/fault_at.py", fault, "training", *arguments),
        PREFECT_CLIENT_MAX_RETRIES="0",
        PREFECT_API_REQUEST_TIMEOUT="5",
    )
    output, _ = process.communicate(timeout=scaled(60))
    assert process.returncode == 0, output
    assert "the run continues without it" in output
    assert "Traceback" not in output
    assert "step 12/12  validation loss" in output
    assert mlflow_run(root)[1].info.status == "FINISHED"
    assert flow_states(root) == ["RUNNING"]


def test_run_starts_without_prefect_server(tiny_config: Path, new_root: Path) -> None:
    root = new_root
    process = command(
        *("-m", "flows.cli.main", "run", str(tiny_config), "--set", f"run.root={root}"),
        PREFECT_API_URL=f"http://127.0.0.1:{free_port()}/api",
    )
    output, _ = process.communicate(timeout=scaled(60))
    assert process.returncode == 0, output
    assert output.count("Prefect's API is unreachable") == 1
    assert "Traceback" not in output
    assert mlflow_run(root)[1].info.status == "FINISHED"
