"""Tracking with a real MLflow store: everything is sent once, and no failure stops a run."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from gpt.artifacts import DatasetManifest, HeldoutLoss, SourceFile, Split
from gpt.config.loading import load_config
from gpt.config.schema import RunConfig
from gpt.training.metrics import StepRecord
from tasks.tracking import journal, runs
from tasks.tracking.mlflow_api import MlflowClient, Tag
from tasks.tracking.runs import (
    RunRef,
    attach_artifacts,
    open_recorder,
    open_run,
    track_run_status,
)


@pytest.fixture
def config(tiny_config: Path) -> RunConfig:
    return load_config(tiny_config, {"tracking": {"experiment": "tracking-tests"}})


@pytest.fixture
def dataset(tmp_path: Path) -> DatasetManifest:
    """A manifest without shards: tracking reads nothing else."""
    split = Split(shards=(), documents=1, tokens=10, text_bytes=40)
    return DatasetManifest(
        fingerprint="0123456789abcdef" * 4,
        folder=tmp_path,
        tokenizer="gpt2",
        ranks_sha256="0" * 64,
        text_column="text",
        validation_fraction=0.1,
        sources=(SourceFile(path="pages.parquet", size_bytes=1, sha256="0" * 64, rows=2),),
        train=split,
        validation=split,
        skipped={},
    )


@pytest.fixture
def run(config: RunConfig, dataset: DatasetManifest, tmp_path: Path) -> RunRef:
    return open_run(config, dataset, tmp_path)


@pytest.fixture
def unreachable_uri(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an MLflow server that does not run, set as MLFLOW_TRACKING_URI."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def record(step: int, loss: float = 2.0, validation: HeldoutLoss | None = None) -> StepRecord:
    return StepRecord(
        step=step,
        tokens_seen=step * 100,
        learning_rate=1e-3,
        loss=loss,
        grad_norm=1.0,
        tokens_per_second=50.0,
        validation=validation,
    )


def history(client: MlflowClient, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def test_metrics_parameters_and_files_are_sent(run: RunRef, mlflow_client: MlflowClient) -> None:
    held = HeldoutLoss(tokens=5, loss=3.0, perplexity=20.0, bits_per_byte=1.5)
    sample = run.folder / "sample.txt"
    sample.write_text("Once upon a time")
    with track_run_status(run):
        with open_recorder(run) as recorder:
            recorder.log_step(StepRecord(0, 0, 0.0, validation=held))
            for step in range(1, 251):
                recorder.log_step(record(step, loss=1 / step))
        attach_artifacts(run, {"samples/sample.txt": sample})

    found = mlflow_client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["model.n_embd"] == "16"
    assert found.data.params["parameters"] == str(50_304 * 16 + 32 * 16 + 12 * 16 * 16 + 3 * 16)
    assert found.data.params["dataset.fingerprint"] == "0123456789abcdef" * 4
    assert history(mlflow_client, run.run_id, "train/loss") == [
        (step, 1 / step) for step in range(1, 251)
    ]
    assert history(mlflow_client, run.run_id, "val/bits_per_byte") == [(0, 1.5)]
    assert history(mlflow_client, run.run_id, "mfu") == []
    [dataset] = found.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.tags[0].value) == ("pages", "training")
    assert [a.path for a in mlflow_client.list_artifacts(run.run_id)] == [
        "config.json",
        "dataset",
        "samples",
    ]


def test_resending_metrics_creates_no_duplicates(run: RunRef, mlflow_client: MlflowClient) -> None:
    with open_recorder(run) as recorder:
        for step, loss in enumerate((2.0, float("nan"), float("inf"), 1.0), start=1):
            recorder.log_step(record(step, loss))
    before = history(mlflow_client, run.run_id, "train/loss")
    state = journal.read_sync_state(run.folder)
    assert state
    journal.save_state(run.folder, state, sent_bytes=0)
    runs.sync_folder(run.folder, run.uri)
    assert str(history(mlflow_client, run.run_id, "train/loss")) == str(before)  # nan != nan
    assert len(before) == 4


def test_run_is_found_without_sync_state(run: RunRef, mlflow_client: MlflowClient) -> None:
    (run.folder / journal.SYNC_STATE_FILE).unlink()
    runs.sync_folder(run.folder, run.uri)
    state = journal.read_sync_state(run.folder)
    assert state
    assert state.run_id == run.run_id


def test_deleted_run_is_recreated_with_all_metrics(
    run: RunRef, config: RunConfig, dataset: DatasetManifest, mlflow_client: MlflowClient
) -> None:
    with open_recorder(run) as recorder:
        recorder.log_step(record(1))
    mlflow_client.delete_run(run.run_id)
    again = open_run(config, dataset, run.folder)
    assert again.run_id != run.run_id
    assert history(mlflow_client, again.run_id, "train/loss") == [(1, 2.0)]


def test_resumed_run_records_each_step_once(run: RunRef, mlflow_client: MlflowClient) -> None:
    for steps in (range(1, 8), range(5, 11)):
        with open_recorder(run) as recorder:
            for step in steps:
                recorder.log_step(record(step))
    assert [s for s, _ in history(mlflow_client, run.run_id, "train/loss")] == list(range(1, 11))


def test_incomplete_last_line_is_dropped_and_rewritten(run: RunRef) -> None:
    first = journal.MetricsJournal(run.folder)
    first.append(1, {"train/loss": 2.0})
    with first.path.open("a") as file:
        file.write('{"step": 2, "time_ms": 17, "metr')
    second = journal.MetricsJournal(run.folder)
    assert not second.append(1, {"train/loss": 2.0})
    assert second.append(2, {"train/loss": 1.0})
    assert [line.step for line in journal.read_metrics(first.path)[0]] == [1, 2]


def test_unreachable_server_receives_everything_later(
    config: RunConfig,
    dataset: DatasetManifest,
    tmp_path: Path,
    unreachable_uri: str,
    mlflow_client: MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = open_run(config, dataset, tmp_path)
    assert run.run_id is None
    with track_run_status(run), open_recorder(run) as recorder:
        began = time.monotonic()
        for step in range(1, 101):
            recorder.log_step(record(step))
        assert time.monotonic() - began < 1
    printed = capsys.readouterr().out
    assert printed.count("cannot be reached") == 1
    assert printed.count("100 steps are unsent") == 1
    assert unreachable_uri in printed

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    back = open_run(config, dataset, tmp_path)
    assert [s for s, _ in history(mlflow_client, back.run_id, "train/loss")] == list(range(1, 101))
    assert mlflow_client.get_run(back.run_id).info.status == "FINISHED"


def test_slow_server_delays_no_step_and_little_at_the_end(
    run: RunRef, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "sync_folder", lambda *_: time.sleep(30))
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.2)
    began = time.monotonic()
    with track_run_status(run), open_recorder(run) as recorder:
        for step in range(1, 101):
            recorder.log_step(record(step))
    assert time.monotonic() - began < 2
    assert "100 steps are unsent" in capsys.readouterr().out


def test_full_disk_is_a_warning(
    run: RunRef, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.MetricsJournal, "append", full)
    with open_recorder(run) as recorder:
        recorder.log_step(record(1))
        recorder.log_step(record(2))
    assert capsys.readouterr().out.count("No space left on device") == 1


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("the loss became infinite"), "FAILED", "the loss became infinite"),
        (KeyboardInterrupt(), "KILLED", None),
    ],
)
def test_status_reflects_how_the_run_ended(
    run: RunRef,
    mlflow_client: MlflowClient,
    error: BaseException,
    status: str,
    message: str | None,
) -> None:
    with pytest.raises(type(error)), track_run_status(run):
        raise error
    found = mlflow_client.get_run(run.run_id)
    assert found.info.status == status
    assert found.data.tags.get(Tag.ERROR) == message

    with open_recorder(run) as recorder:
        recorder.log_step(record(1))
    assert mlflow_client.get_run(run.run_id).info.status == "RUNNING"
    with track_run_status(run):
        pass
    found = mlflow_client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert Tag.ERROR not in found.data.tags


def test_library_warnings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("gpt.training.loop").warning("batch_size %d -> %d", 8, 4)
    assert "warning: batch_size 8 -> 4" in capsys.readouterr().out
