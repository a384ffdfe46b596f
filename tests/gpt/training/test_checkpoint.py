"""Checkpoints: complete or not there, the damaged set aside, the right ones kept, the disk full."""

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


def assert_sound(folder, steps):
    """There is a checkpoint of one of `steps`, and it is what was written."""
    found = latest_valid_checkpoint(folder)
    assert found.step in steps
    assert torch.all(weights(folder)["weight"] == found.step)


# --- killed at every boundary --------------------------------------------------------------------


def write_and_die(folder, nth, calls):
    def at(n):
        calls.value = n
        if n == nth:
            faults.kill_self()

    taken = snapshot_of(folder, 2, checkpoints_kept=1)
    faults.count_file_calls(folder, at)
    write_checkpoint(folder, taken)


def test_killed_at_every_call_a_complete_checkpoint_is_left(tmp_path):
    """Before each call that touches files: the writing of one checkpoint and the removal of
    another, until a process comes through."""
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
        assert_sound(folder, {1, 2} if killed else {2})
        # What the dead process left is in nobody's way.
        write(folder, 3, checkpoints_kept=1)
        assert_sound(folder, {3})
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert nth == calls.value + 1
    assert nth > 15


def save_and_die(folder, nth, share):
    taken = snapshot_of(folder, 2)
    checkpoint_format.save_file = faults.die_while_saving(nth, share)
    write_checkpoint(folder, taken)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_killed_inside_a_file_the_one_before_is_left(tmp_path, nth, share):
    write(tmp_path, 1)
    process = PROCESSES.Process(target=save_and_die, args=(tmp_path, nth, share))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert_sound(tmp_path, {1})


# --- damaged -------------------------------------------------------------------------------------

FILES = ["model.safetensors", "optimizer.safetensors", "random.safetensors", "progress.json"]
DAMAGES = [faults.flip_byte, faults.cut_in_half, faults.delete]


@pytest.mark.parametrize("name", [*FILES, "config.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_one_is_set_aside_by_name(tmp_path, damage, name, caplog):
    write(tmp_path, 1)
    damage(write(tmp_path, 2).folder / name)
    assert_sound(tmp_path, {1})
    assert name in caplog.text
    assert "damaged-step-00000002" in caplog.text
    assert (tmp_path / "checkpoints" / "damaged-step-00000002").is_dir()


def test_a_marker_that_is_cut_short_does_not_stand(tmp_path):
    write(tmp_path, 1)
    faults.cut_in_half(write(tmp_path, 2).folder / "COMPLETE")
    assert_sound(tmp_path, {1})


def test_with_nothing_sound_left_it_starts_from_scratch(dataset, tmp_path, caplog):
    config = small_config(tmp_path)
    list(train(config, dataset, tmp_path / "run"))
    whole = {name: tensor.clone() for name, tensor in weights(tmp_path / "run").items()}
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        faults.flip_byte(path / "model.safetensors")
    list(train(config, dataset, tmp_path / "run"))
    assert caplog.text.count("set aside") == 2
    assert all(torch.equal(tensor, weights(tmp_path / "run")[n]) for n, tensor in whole.items())


def test_training_goes_on_from_the_one_before(dataset, tmp_path):
    config = small_config(tmp_path)
    whole = numbers(train(config, dataset, tmp_path / "run"))
    ours = weights(tmp_path / "run")
    faults.flip_byte(latest_checkpoint(tmp_path / "run").folder / "optimizer.safetensors")
    rest = numbers(train(config, dataset, tmp_path / "run"))
    assert rest[0].step == 10
    assert rest == [record for record in whole if record.step > 10 or record == rest[0]]
    assert all(torch.equal(tensor, weights(tmp_path / "run")[n]) for n, tensor in ours.items())


# --- of another run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model__n_embd": 32}, "model.n_embd"),
        ({"optimizer__learning_rate": 1e-3}, "optimizer.learning_rate"),
        ({"training__seed": 1}, "training.seed"),
        ({"training__grad_acc": 4}, "sequences_per_step"),
    ],
)
def test_a_changed_run_is_refused_by_key(dataset, tmp_path, change, key):
    list(train(small_config(tmp_path, training__max_steps=4), dataset, tmp_path / "run"))
    with pytest.raises(CheckpointError) as caught:
        list(train(small_config(tmp_path, **change), dataset, tmp_path / "run"))
    assert [problem.key for problem in caught.value.problems] == [key]


def test_a_changed_data_set_is_refused(dataset, tmp_path):
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
def test_what_may_change_on_resume(dataset, tmp_path, change):
    def stop():
        return bool(told) and told[-1].step == 10

    told = []
    told.extend(train(small_config(tmp_path), dataset, tmp_path / "run", stop))
    changed = small_config(tmp_path, **change)
    rest = [r.step for r in train(changed, dataset, tmp_path / "run") if r.loss]
    assert rest == list(range(11, changed.training.max_steps + 1))


# --- which stay ----------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, checkpoints_kept=2)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_every_nth_is_kept_for_good(tmp_path):
    for step in range(1, 8):
        write(tmp_path, step, checkpoints_kept=1, checkpoint_keep_every=3)
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000007"]


def test_the_best_is_kept(dataset, tmp_path, monkeypatch):
    losses = iter([11.0, 5.0, 3.0, 4.0, 4.0, 4.0])
    real = retention.record_best
    monkeypatch.setattr(
        "gpt.training.loop.record_best", lambda folder, step, _: real(folder, step, next(losses))
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
def impatient(monkeypatch):
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


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("owner", "name", "error"), DISK_FAULTS)
def test_training_waits_for_the_disk_and_goes_on(
    dataset, tmp_path, monkeypatch, caplog, owner, name, error
):
    whole = numbers(train(small_config(tmp_path), dataset, tmp_path / "whole"))
    with faults.failing(monkeypatch, owner, name, error, times=3) as refused:
        told = numbers(train(small_config(tmp_path), dataset, tmp_path / "run"))
    assert len(refused) == 3
    assert told == whole
    assert "cannot be written" in caplog.text
    assert "training goes on" in caplog.text
    verify_checkpoint(latest_checkpoint(tmp_path / "run").folder)


@pytest.mark.usefixtures("impatient")
def test_a_full_disk_keeps_the_older_ones_and_a_stop_ends_the_waiting(
    dataset, tmp_path, monkeypatch, caplog
):
    config = small_config(tmp_path, training__checkpoint_interval=5)
    asked = []

    def stop():
        asked.append(1)
        return "cannot be written" in caplog.text and len(asked) > 40

    real = retention.shutil.disk_usage

    def full(path):
        usage = real(path)
        return (
            usage._replace(free=0)
            if (tmp_path / "run/checkpoints/step-00000005").exists()
            else usage
        )

    monkeypatch.setattr(retention.shutil, "disk_usage", full)
    told = list(train(config, dataset, tmp_path / "run", stop))
    assert told[-1].step in (10, 11)
    assert "bytes are needed, 0 are free" in caplog.text
    assert latest_checkpoint(tmp_path / "run").step == 5
    monkeypatch.undo()
    assert next(iter(train(config, dataset, tmp_path / "run"))).step == 6


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("leaves", [False, True])
def test_a_disk_found_full_some_steps_later_holds_up_no_stop(
    dataset, tmp_path, monkeypatch, caplog, leaves
):
    """The checkpoint of step 10 is refused when step 12 is through: there is a newer one to write
    when the stop comes, or whoever trains leaves."""
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
        return not leaves and "cannot be written" in caplog.text

    steps = []
    for record in train(config, dataset, tmp_path / "run", stop):
        steps.append(record.step)
        if record.step == 12:
            later.set()
            wait_for("the refusal", lambda: "cannot be written" in caplog.text)
            if leaves:
                break
    assert steps[-1] == 12
    assert "the checkpoint of step 10 was not written" in caplog.text
    assert latest_checkpoint(tmp_path / "run").step == 5


def test_on_a_file_system_that_is_really_full(tmp_path, monkeypatch):
    """A memory-backed one of 200 kB, where the machine allows to mount it."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or os.system(f"mount -t tmpfs -o size=200k tmpfs {small} 2>/dev/null"):
        pytest.skip("no file system can be mounted here")
    monkeypatch.setattr(
        checkpoint_format, "SMALL_FILES_BYTES", 0
    )  # the check beforehand lets it pass
    try:
        write(small, 1)
        (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free - 8192))
        with pytest.raises((OSError, SafetensorError), match="No space left"):
            write(small, 2)
        assert_sound(small, {1})
    finally:
        os.system(f"umount {small}")


# --- one at a time -------------------------------------------------------------------------------


def hold(folder, ready, done):
    with run_lock(folder):
        ready.set()
        done.wait()


def test_a_run_has_one_process_and_a_dead_holder_does_not_count(tmp_path):
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
