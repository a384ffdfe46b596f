"""The training loop: its steps and records, stop and resume, and the folder of a run."""

import pytest
import torch
from torch.nn import functional as F
from training_data import make_token_dataset, numbers, small_config, tiny_config, weights

from gpt.errors import ConfigError
from gpt.training import loop
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.checkpoint.writer import CheckpointWriter
from gpt.training.loop import setup, train
from gpt.training.run_dir import open_run_dir
from gpt.training.step import TrainState


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


def test_loss_falls_and_every_step_has_a_record(dataset, tmp_path):
    records = list(train(tiny_config(tmp_path), dataset, tmp_path / "run"))
    steps = [record for record in records if record.loss]
    assert [record.step for record in steps] == list(range(1, 21))
    held = [record for record in records if record.validation]
    assert [record.step for record in held] == [0, 10, 20]
    assert held[0].validation.loss > 10
    assert held[-1].validation.loss < held[0].validation.loss - 1
    assert steps[-1].tokens_seen == 20 * 4 * 2 * 32
    assert all(record.grad_norm > 0 for record in steps)


def test_throughput_excludes_checkpoints_and_evaluations(dataset, tmp_path, monkeypatch):
    """The clock advances by 1 s per micro-batch, and by 100 s per checkpoint, evaluation or record
    that the consumer handles."""
    now = 0.0

    def slow(owner, name, seconds):
        real = getattr(owner, name)

        def taking(self, *rest, **named):
            nonlocal now
            now += seconds
            return real(self, *rest, **named)

        monkeypatch.setattr(owner, name, taking)

    slow(TrainState, "forward_backward", 1.0)
    slow(TrainState, "evaluate", 100.0)
    slow(CheckpointWriter, "save", 100.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)
    config = small_config(tmp_path, training__max_steps=9, training__checkpoint_interval=3)
    seconds = []
    for record in train(config, dataset, tmp_path / "run"):
        now += 100.0
        if record.loss:
            seconds.append(config.tokens_per_step / record.tokens_per_second)
    assert seconds == pytest.approx([config.training.grad_acc] * 9)


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    """The numbers and the folder of a run that is not interrupted."""
    root = tmp_path_factory.mktemp("uninterrupted")
    return numbers(train(small_config(root), dataset, root / "run")), root / "run"


@pytest.mark.parametrize("stopped_after", [1, 7, 10, 13])
def test_resume_after_a_stop_is_bit_for_bit_the_same(
    dataset, uninterrupted, tmp_path, stopped_after
):
    config = small_config(tmp_path)
    expected, expected_folder = uninterrupted
    first = []

    def stop():
        return any(record.step == stopped_after for record in first)

    first.extend(train(config, dataset, tmp_path / "parts", stop))
    assert latest_checkpoint(tmp_path / "parts").step == stopped_after
    rest = numbers(train(config, dataset, tmp_path / "parts"))
    first = numbers(first)
    if stopped_after == 10:  # an evaluation is repeated after a resume
        assert rest[0] == first.pop()
    assert first + rest == expected
    ours, theirs = weights(tmp_path / "parts"), weights(expected_folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_stop_inside_a_step_drops_that_step(dataset, uninterrupted, tmp_path):
    config = small_config(tmp_path)
    calls = 0

    def stop():
        nonlocal calls
        calls += 1
        return calls > 3 * 5 + 2  # once per step and micro-batch: the second one of step 6

    records = list(train(config, dataset, tmp_path / "parts", stop))
    assert records[-1].step == 5
    rest = list(train(config, dataset, tmp_path / "parts"))
    assert numbers(records + rest) == uninterrupted[0]


def test_error_or_closed_generator_saves_the_last_step(
    dataset, uninterrupted, tmp_path, monkeypatch
):
    config = small_config(tmp_path)
    for record in train(config, dataset, tmp_path / "closed"):
        if record.step == 7:
            break
    assert latest_checkpoint(tmp_path / "closed").step == 7
    real = TrainState.forward_backward

    def failing(self, batch, **named):
        if self.loader.position > 6 * 8:
            raise KeyboardInterrupt
        return real(self, batch, **named)

    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "forward_backward", failing)
        with pytest.raises(KeyboardInterrupt):
            list(train(config, dataset, folder))
    assert latest_checkpoint(folder).step == 6
    list(train(config, dataset, folder))
    ours, theirs = weights(folder), weights(uninterrupted[1])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_finished_run_yields_no_records(dataset, tmp_path):
    config = tiny_config(tmp_path, training__max_steps=4, schedule__warmup_steps=1)
    list(train(config, dataset, tmp_path / "run"))
    assert latest_checkpoint(tmp_path / "run").finished
    assert list(train(config, dataset, tmp_path / "run")) == []


@pytest.mark.parametrize(("batch_size", "grad_acc"), [(1, 8), (2, 4), (4, 2)])
def test_gradient_accumulation_equals_one_large_batch(dataset, tmp_path, batch_size, grad_acc):
    def first_steps(**split):
        config = tiny_config(tmp_path, model__dropout=0.0, training__max_steps=4, **split)
        return [r for r in train(config, dataset, tmp_path / str(split)) if r.loss]

    big = first_steps(training__batch_size=8, training__grad_acc=1)
    small = first_steps(training__batch_size=batch_size, training__grad_acc=grad_acc)
    for ours, theirs in zip(small, big, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)


def test_first_loss_and_gradient_equal_those_of_plain_torch(dataset, tmp_path):
    config = tiny_config(tmp_path, model__dropout=0.0, training__max_steps=4)
    record = list(train(config, dataset, tmp_path / "run"))[1]
    state = TrainState(config, dataset)
    inputs, targets = state.loader.next_batch(8)
    logits = state.model(inputs) @ state.model.head.T
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(loss, list(state.model.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    assert record.grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_missing_device_is_a_config_error(dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"hardware.device = cuda:99"):
        setup(tiny_config(tmp_path, hardware__device="cuda:99"), dataset, tmp_path / "run")


class TestRunDir:
    def test_same_config_resumes_in_the_same_folder(self, dataset, tmp_path):
        config = tiny_config(tmp_path)
        folder = open_run_dir(config, dataset)
        assert open_run_dir(config, dataset) == folder
        assert folder.parent == tmp_path / "train"
        assert folder.name.startswith("t-")

    def test_settings_that_do_not_change_the_weights_keep_the_folder(self, dataset, tmp_path):
        folder = open_run_dir(tiny_config(tmp_path), dataset)
        split = {"training__batch_size": 2, "training__grad_acc": 4}
        for change in (split, {"training__log_interval": 3}, {"evaluation__interval": 5}):
            assert open_run_dir(tiny_config(tmp_path, **change), dataset) == folder

    def test_interrupted_run_may_get_more_steps(self, dataset, tmp_path):
        folder = open_run_dir(tiny_config(tmp_path), dataset)
        longer = tiny_config(tmp_path, training__max_steps=30)
        assert open_run_dir(longer, dataset) == folder

    def test_finished_run_is_not_extended(self, dataset, tmp_path):
        config = tiny_config(tmp_path, training__max_steps=4)
        folder = open_run_dir(config, dataset)
        list(train(config, dataset, folder))
        assert open_run_dir(config, dataset) == folder
        for steps in (5, 6):
            other = tiny_config(tmp_path, training__max_steps=steps)
            assert open_run_dir(other, dataset) != folder
        assert open_run_dir(config, dataset, fresh=True) != folder

    @pytest.mark.parametrize(
        "change",
        [
            {"model__n_embd": 32},
            {"optimizer__learning_rate": 1e-3},
            {"training__seed": 1},
            {"training__grad_acc": 3},
        ],
    )
    def test_another_model_or_optimizer_gets_another_folder(self, dataset, tmp_path, change):
        folder = open_run_dir(tiny_config(tmp_path), dataset)
        assert open_run_dir(tiny_config(tmp_path, **change), dataset) != folder
