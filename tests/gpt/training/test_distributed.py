"""Many processes train like one: real processes, torch's launcher, gloo."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from training_data import make_token_dataset, small_config
from waiting import scaled

from gpt.config.schema import RunConfig
from gpt.data.loader import SequenceDataset, TrainingLoader
from gpt.errors import ConfigError, DistributedError
from gpt.training.checkpoint.retention import latest_checkpoint, write_batch_size
from gpt.training.distributed import launch
from gpt.training.distributed.launch import launch_training
from gpt.training.metrics import StepRecord

pytestmark = pytest.mark.slow

STEPS = 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


def group_config(root: Path, devices: int, **changes) -> RunConfig:
    return small_config(
        root,
        **{
            "model__dropout": 0.0,
            "model__n_embd": 24,
            "training__batch_size": 2,
            "training__grad_acc": 4,
            "training__max_steps": STEPS,
            "evaluation__interval": 20,
            "hardware__devices": devices,
            "hardware__timeout_seconds": 30,
            **changes,
        },
    )


def losses(records: list[StepRecord]) -> dict[int, float]:
    """Return the loss of each step, of which there must be one record."""
    pairs = [(record.step, record.loss) for record in records if record.loss is not None]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def assert_same_curve(ours: dict[int, float], theirs: dict[int, float]) -> None:
    assert ours.keys() == theirs.keys()
    assert list(ours.values()) == pytest.approx([theirs[step] for step in ours], rel=1e-4)


NANOCHAT = {"model__architecture": "nanochat", "optimizer__name": "muon"}


@pytest.fixture(scope="module")
def single_process(dataset, tmp_path_factory):
    """The records of one process, by architecture."""
    root = tmp_path_factory.mktemp("single")
    return {
        name: list(launch_training(group_config(root, 1, **changes), dataset, root / name))
        for name, changes in {"gpt2": {}, "nanochat": NANOCHAT}.items()
    }


@pytest.mark.parametrize(
    ("devices", "sharding", "architecture"),
    [(2, "ddp", "gpt2"), (4, "ddp", "nanochat"), (2, "fsdp", "nanochat")],
)
def test_losses_do_not_depend_on_the_number_of_processes(
    dataset, single_process, tmp_path, devices, sharding, architecture
):
    changes = NANOCHAT if architecture == "nanochat" else {}
    config = group_config(tmp_path, devices, hardware__sharding=sharding, **changes)
    records = list(launch_training(config, dataset, tmp_path / "run"))
    one = single_process[architecture]
    assert_same_curve(losses(records), losses(one))
    norms = [r.grad_norm for r in records if r.grad_norm], [r.grad_norm for r in one if r.grad_norm]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    held = [r.validation.loss for r in records if r.validation]
    assert held == pytest.approx([r.validation.loss for r in one if r.validation], rel=1e-4)
    assert latest_checkpoint(tmp_path / "run").finished


def test_processes_together_read_the_batches_of_one(dataset):
    sequences = SequenceDataset(dataset, dataset.train, 32)
    single = TrainingLoader(sequences, 5)
    loaders = [TrainingLoader(sequences, 5) for _ in range(4)]
    for turn in range(2 * len(sequences) // 3):  # past the end of an epoch
        for rank, loader in enumerate(loaders):
            if turn % 4 == rank:
                batch = loader.next_batch(3)
            else:
                loader.skip(3)
        expected = single.next_batch(3)
        assert all(np.array_equal(a, b) for a, b in zip(batch, expected, strict=True))
    assert {loader.position for loader in loaders} == {single.position}


def test_checkpoint_of_four_processes_resumes_with_one_and_with_two(
    dataset, single_process, tmp_path
):
    """The first generator is closed, which saves a checkpoint; the last group starts with smaller
    micro-batches, like after running out of memory."""
    folder = tmp_path / "run"
    four = launch_training(group_config(tmp_path, 4), dataset, folder)
    first = list(itertools.takewhile(lambda record: record.step < 9, four))
    four.close()
    saved = latest_checkpoint(folder).step
    assert 9 <= saved < 20
    assert workers() == []
    middle = train_until(20, group_config(tmp_path, 1), dataset, folder)
    assert min(losses(middle)) == saved + 1
    write_batch_size(folder, 1)
    last = list(
        launch_training(group_config(tmp_path, 2, hardware__sharding="fsdp"), dataset, folder)
    )
    assert {record.batch_size for record in last if record.loss is not None} == {1}
    ours, expected = losses([*first, *middle, *last]), losses(single_process["gpt2"])
    assert ours.keys() >= set(expected) - set(range(9, saved + 1))
    assert_same_curve(ours, {step: expected[step] for step in ours})
    assert latest_checkpoint(folder).finished


def train_until(step: int, config: RunConfig, dataset, folder: Path) -> list[StepRecord]:
    """Train until `step` or a little longer, and return the records."""
    records: list[StepRecord] = []
    reached = threading.Event()
    for record in launch_training(config, dataset, folder, reached.is_set):
        records += [record]
        if record.step >= step:
            reached.set()
    return records


def workers() -> list[psutil.Process]:
    """List the worker processes that this process has launched."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if each.cmdline()[-1:] == ["gpt.training.distributed.worker"]]


def test_lost_process_restarts_the_group_from_the_last_checkpoint(
    dataset, single_process, tmp_path, caplog
):
    config = group_config(tmp_path, 2, training__checkpoint_interval=7)
    records, killed = [], False
    for record in launch_training(config, dataset, tmp_path / "run"):
        records.append(record)
        if record.step == 17 and not killed:
            workers()[-1].send_signal(signal.SIGKILL)
            killed = True
    steps = [r for r in records if r.loss is not None]
    curve = {r.step: r.loss for r in steps}
    assert_same_curve(curve, losses(single_process["gpt2"]))
    assert len(steps) < 2 * STEPS
    assert "all processes restarted from step 14" in caplog.text


def test_error_in_a_worker_ends_the_group_with_its_message(dataset, tmp_path):
    config = group_config(tmp_path, 2, training__max_steps=10, model__block_size=8_000)
    with pytest.raises(Exception, match="too few for one sequence") as caught:
        list(launch_training(config, dataset, tmp_path / "run"))
    assert type(caught.value).__name__ == "DatasetError"
    assert workers() == []


def test_group_that_cannot_start_names_its_logs(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "local_address", lambda _: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none-such")
    config = group_config(tmp_path, 2, hardware__restarts=0)
    with pytest.raises(DistributedError, match="see the last output of its processes in"):
        list(launch_training(config, dataset, tmp_path / "run"))


def test_workers_end_when_their_launcher_is_killed(dataset, tmp_path):
    config, folder = group_config(tmp_path, 2, training__max_steps=100_000), tmp_path / "run"
    pid = os.fork()
    if not pid:
        for _ in launch_training(config, dataset, folder):
            pass
    while latest_checkpoint(folder) is None:
        time.sleep(0.1)
    children = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(children, timeout=scaled(10))
    assert alive == []


def test_step_that_cannot_be_split_over_devices_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"set training.grad_acc to 3 or 6"):
        group_config(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"is not host:port, which hardware.nodes = 2 needs"):
        group_config(tmp_path, 1, hardware__nodes=2)
