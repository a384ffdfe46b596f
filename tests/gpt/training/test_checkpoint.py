"""Checkpoints: atomic writes, damaged files, retention, full disks, and the lock of a run."""

import errno
import os
import shutil
import threading

import faults
import pytest
import torch
from safetensors import SafetensorError
from training_data import make_token_dataset, numbers, small_config, weights
from waiting import wait_for

from gpt.errors import CheckpointError, RunLockedError
from gpt.training.checkpoint import format as checkpoint_format
from gpt.training.checkpoint import retention, writer
from gpt.training.checkpoint.format import take_snapshot, write_checkpoint
from gpt.training.checkpoint.retention import (
    TrainingProgress,
    latest_checkpoint,
    latest_valid_checkpoint,
    verify_checkpoint,
)
from gpt.training.loop import train
from gpt.training.run_lock import run_lock

PROCESSES = faults.forkserver_context("gpt.training.loop", "test_checkpoint")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


def snapshot_of(folder, step, **training):
    config = small_config(folder, **{f"training__{key}": value for key, value in training.items()})
    model = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(model.weight, step)
    progress = TrainingProgress(
        step=step, position=step, tokens_seen=step, finished=False, dataset_fingerprint="f"
    )
    return take_snapshot(config, model, [], progress)


def write(folder, step, **training):
    return write_checkpoint(folder, snapshot_of(folder, step, **training))


def assert_valid(folder, steps):
    """The latest valid checkpoint is of one of `steps`, and holds what was written."""
    found = latest_valid_checkpoint(folder)
    assert found.step in steps
    assert torch.all(weights(folder)["weight"] == found.step)


# --- killed while writing ------------------------------------------------------------------------


def write_and_die(folder, nth, calls):
    def at(n):
        calls.value = n
        if n == nth:
            faults.kill_self()

    snapshot = snapshot_of(folder, 2, checkpoints_kept=1)
    faults.count_file_calls(folder, at)
    write_checkpoint(folder, snapshot)


def test_kill_at_any_file_call_leaves_a_complete_checkpoint(tmp_path):
    """Kill before each call that touches files while one checkpoint is written and another removed,
    until a process survives."""
    nth, killed = 0, True
    while killed:
        nth += 1
        folder = tmp_path / str(nth)
        write(folder, 1, checkpoints_kept=1)
        calls = PROCESSES.Value("i", 0)
        process = PROCESSES.Process(target=write_and_die, args=(folder, nth, calls))
        process.start()
        process.join()
        killed = process.exitcode == -9
        assert killed or process.exitcode == 0
        assert_valid(folder, {1, 2} if killed else {2})
        # What the killed process left does not disturb the next one.
        write(folder, 3, checkpoints_kept=1)
        assert_valid(folder, {3})
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert nth == calls.value + 1
    assert nth > 15


def save_and_die(folder, nth, share):
    snapshot = snapshot_of(folder, 2)
    checkpoint_format.save_file = faults.die_while_saving(nth, share)
    write_checkpoint(folder, snapshot)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_kill_inside_a_file_leaves_the_checkpoint_before(tmp_path, nth, share):
    write(tmp_path, 1)
    process = PROCESSES.Process(target=save_and_die, args=(tmp_path, nth, share))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert_valid(tmp_path, {1})


# --- damaged -------------------------------------------------------------------------------------

FILES = ["model.safetensors", "optimizer.safetensors", "random.safetensors", "progress.json"]
DAMAGES = [faults.flip_byte, faults.cut_in_half, faults.delete]


@pytest.mark.parametrize("name", [*FILES, "config.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_set_aside(tmp_path, damage, name, caplog):
    write(tmp_path, 1)
    damage(write(tmp_path, 2).folder / name)
    assert_valid(tmp_path, {1})
    assert name in caplog.text
    assert "damaged-step-00000002" in caplog.text
    assert (tmp_path / "checkpoints" / "damaged-step-00000002").is_dir()


def test_truncated_marker_is_not_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    faults.cut_in_half(write(tmp_path, 2).folder / "COMPLETE")
    assert_valid(tmp_path, {1})


def test_without_a_valid_checkpoint_training_restarts(dataset, tmp_path, caplog):
    config = small_config(tmp_path)
    list(train(config, dataset, tmp_path / "run"))
    expected = {name: tensor.clone() for name, tensor in weights(tmp_path / "run").items()}
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        faults.flip_byte(path / "model.safetensors")
    list(train(config, dataset, tmp_path / "run"))
    assert caplog.text.count("set aside") == 2
    assert all(torch.equal(tensor, weights(tmp_path / "run")[n]) for n, tensor in expected.items())


def test_training_resumes_from_the_checkpoint_before_a_damaged_one(dataset, tmp_path):
    config = small_config(tmp_path)
    expected = numbers(train(config, dataset, tmp_path / "run"))
    ours = weights(tmp_path / "run")
    faults.flip_byte(latest_checkpoint(tmp_path / "run").folder / "optimizer.safetensors")
    rest = numbers(train(config, dataset, tmp_path / "run"))
    assert rest[0].step == 10
    assert rest == [record for record in expected if record.step > 10 or record == rest[0]]
    assert all(torch.equal(tensor, weights(tmp_path / "run")[n]) for n, tensor in ours.items())


# --- another run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model__n_embd": 32}, "model.n_embd"),
        ({"optimizer__learning_rate": 1e-3}, "optimizer.learning_rate"),
        ({"training__seed": 1}, "training.seed"),
        ({"training__grad_acc": 4}, "sequences_per_step"),
    ],
)
def test_changed_config_is_refused_by_key(dataset, tmp_path, change, key):
    list(train(small_config(tmp_path, training__max_steps=4), dataset, tmp_path / "run"))
    with pytest.raises(CheckpointError) as caught:
        list(train(small_config(tmp_path, **change), dataset, tmp_path / "run"))
    assert [problem.key for problem in caught.value.problems] == [key]


def test_changed_dataset_is_refused(dataset, tmp_path):
    list(train(small_config(tmp_path, training__max_steps=4), dataset, tmp_path / "run"))
    other = dataset.model_copy(update={"fingerprint": "e" * 64})
    with pytest.raises(CheckpointError, match=f"dataset = {'e' * 64}"):
        list(train(small_config(tmp_path), other, tmp_path / "run"))


@pytest.mark.parametrize(
    "change",
    [
        {"training__batch_size": 2, "training__grad_acc": 4},
        {"training__checkpoint_interval": 3, "evaluation__interval": 4},
        {"training__loss_chunk_rows": 64, "training__activation_checkpointing": True},
        {"training__max_steps": 30},
    ],
)
def test_settings_that_may_change_on_resume(dataset, tmp_path, change):
    def stop():
        return bool(records) and records[-1].step == 10

    records = []
    records.extend(train(small_config(tmp_path), dataset, tmp_path / "run", stop))
    changed = small_config(tmp_path, **change)
    rest = [r.step for r in train(changed, dataset, tmp_path / "run") if r.loss]
    assert rest == list(range(11, changed.training.max_steps + 1))


# --- retention -----------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_newest_checkpoints_are_kept(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, checkpoints_kept=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_every_nth_checkpoint_is_kept(tmp_path):
    for step in range(1, 8):
        write(tmp_path, step, checkpoints_kept=1, checkpoint_keep_every=3)
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000007"]


def test_best_checkpoint_is_kept(dataset, tmp_path, monkeypatch):
    losses = iter([11.0, 5.0, 3.0, 4.0, 4.0, 4.0])
    real = retention.record_best
    monkeypatch.setattr(
        "gpt.training.checkpoint.writer.record_best",
        lambda folder, step, _: real(folder, step, next(losses)),
    )
    config = small_config(
        tmp_path,
        training__checkpoint_interval=4,
        training__checkpoints_kept=1,
        evaluation__interval=4,
    )
    next(losses)
    list(train(config, dataset, tmp_path / "run"))
    assert names(tmp_path / "run") == ["step-00000008", "step-00000020"]
    assert retention.read_best(tmp_path / "run").step == 8


# --- the disk ------------------------------------------------------------------------------------


@pytest.fixture
def short_retry_pause(monkeypatch):
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.05)


DISK_FAULTS = [
    (retention.shutil, "disk_usage", faults.disk_error()),
    (
        checkpoint_format,
        "save_file",
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ),
    (checkpoint_format, "sync", faults.disk_error(errno.EIO)),
    (os, "fsync", faults.disk_error(errno.EIO)),
]


@pytest.mark.usefixtures("short_retry_pause")
@pytest.mark.parametrize(("owner", "name", "error"), DISK_FAULTS)
def test_training_waits_for_the_disk_and_continues(
    dataset, tmp_path, monkeypatch, caplog, owner, name, error
):
    expected = numbers(train(small_config(tmp_path), dataset, tmp_path / "expected"))
    with faults.failing(monkeypatch, owner, name, error, times=3) as refused:
        records = numbers(train(small_config(tmp_path), dataset, tmp_path / "run"))
    assert len(refused) == 3
    assert records == expected
    assert "cannot be written" in caplog.text
    assert "training continues" in caplog.text
    verify_checkpoint(latest_checkpoint(tmp_path / "run").folder)


@pytest.mark.usefixtures("short_retry_pause")
def test_full_disk_keeps_older_checkpoints_and_stop_ends_the_wait(
    dataset, tmp_path, monkeypatch, caplog
):
    config = small_config(tmp_path, training__checkpoint_interval=5)
    calls = []

    def stop():
        calls.append(1)
        return "cannot be written" in caplog.text and len(calls) > 40

    real = retention.shutil.disk_usage

    def full(path):
        usage = real(path)
        return (
            usage._replace(free=0)
            if (tmp_path / "run/checkpoints/step-00000005").exists()
            else usage
        )

    monkeypatch.setattr(retention.shutil, "disk_usage", full)
    records = list(train(config, dataset, tmp_path / "run", stop))
    assert records[-1].step in (10, 11)
    assert "bytes are needed, 0 are free" in caplog.text
    assert latest_checkpoint(tmp_path / "run").step == 5
    monkeypatch.undo()
    assert next(iter(train(config, dataset, tmp_path / "run"))).step == 6


@pytest.mark.usefixtures("short_retry_pause")
@pytest.mark.parametrize("closes", [False, True])
def test_disk_that_fills_up_later_does_not_delay_a_stop(
    dataset, tmp_path, monkeypatch, caplog, closes
):
    """The disk refuses the checkpoint of step 10 after step 12: a newer one is due when the run is
    stopped or its consumer closes the generator."""
    config = small_config(tmp_path, training__checkpoint_interval=5)
    later = threading.Event()
    real = retention.shutil.disk_usage

    def full(path):
        if not (tmp_path / "run/checkpoints/step-00000005").exists():
            return real(path)
        later.wait()
        return real(path)._replace(free=0)

    monkeypatch.setattr(retention.shutil, "disk_usage", full)

    def stop():
        return not closes and "cannot be written" in caplog.text

    steps = []
    for record in train(config, dataset, tmp_path / "run", stop):
        steps.append(record.step)
        if record.step == 12:
            later.set()
            wait_for("the refusal", lambda: "cannot be written" in caplog.text)
            if closes:
                break
    assert steps[-1] == 12
    assert "the checkpoint of step 10 was not written" in caplog.text
    assert latest_checkpoint(tmp_path / "run").step == 5


def test_write_fails_on_a_really_full_file_system(tmp_path, monkeypatch):
    """A tmpfs of 200 kB, if the machine allows mounting one."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=200k tmpfs {small} 2>/dev/null"):
        pytest.skip("file systems cannot be mounted here")
    monkeypatch.setattr(
        checkpoint_format, "SMALL_FILES_BYTES", 0
    )  # so that the check of free space passes
    try:
        write(small, 1)
        (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free - 8192))
        with pytest.raises((OSError, SafetensorError), match="No space left"):
            write(small, 2)
        assert_valid(small, {1})
    finally:
        os.system(f"umount {small}")


# --- the lock ------------------------------------------------------------------------------------


def hold(folder, ready, done):
    with run_lock(folder):
        ready.set()
        done.wait()


def test_run_lock_excludes_other_processes_until_the_holder_dies(tmp_path):
    ready, done = PROCESSES.Event(), PROCESSES.Event()
    process = PROCESSES.Process(target=hold, args=(tmp_path, ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(RunLockedError, match=f"process {process.pid} on "), run_lock(tmp_path):
        pass
    process.kill()
    process.join()
    with run_lock(tmp_path), run_lock(tmp_path):
        assert os.getpid() == int(
            (tmp_path / ".lock-holder.json").read_text().split(":")[1].split(",")[0]
        )
    shutil.rmtree(tmp_path)
