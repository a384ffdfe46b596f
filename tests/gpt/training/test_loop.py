"""The loop: what a step is, and that stopping and starting changes nothing."""

import pytest
import torch
from torch.nn import functional as F
from training_data import make_token_dataset, numbers, small_config, tiny_config, weights

from gpt.errors import ConfigError
from gpt.training import loop
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.loop import Trainer, train
from gpt.training.run_dir import open_run_dir
from gpt.training.step import Stepper


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


def test_loss_falls_and_every_step_is_told(dataset, tmp_path):
    records = list(train(tiny_config(tmp_path), dataset, tmp_path / "run"))
    steps = [record for record in records if record.loss]
    assert [record.step for record in steps] == list(range(1, 21))
    held = [record for record in records if record.validation]
    assert [record.step for record in held] == [0, 10, 20]
    assert held[0].validation.loss > 10
    assert held[-1].validation.loss < held[0].validation.loss - 1
    assert steps[-1].tokens_seen == 20 * 4 * 2 * 32
    assert all(record.grad_norm > 0 for record in steps)


def test_a_step_s_time_is_its_own(dataset, tmp_path, monkeypatch):
    """By a clock that only work moves: a micro-step takes 1 s, and what stands between steps, a
    checkpoint or an evaluation, takes 100 s that are in no step's time."""
    now = 0.0

    def slow(owner, name, seconds):
        real = getattr(owner, name)

        def taking(self, *rest):
            nonlocal now
            now += seconds
            return real(self, *rest)

        monkeypatch.setattr(owner, name, taking)

    slow(Stepper, "micro_step", 1.0)
    slow(Trainer, "_write", 100.0)
    slow(Trainer, "_validate", 100.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now)
    config = small_config(tmp_path, training__max_steps=9, training__checkpoint_interval=3)
    records = [r for r in train(config, dataset, tmp_path / "run") if r.loss]
    seconds = [config.tokens_per_step / record.tokens_per_second for record in records]
    assert seconds == pytest.approx([config.training.grad_acc] * 9)


@pytest.fixture(scope="module")
def left_alone(dataset, tmp_path_factory):
    """The numbers and the folder of a run that nothing happens to."""
    root = tmp_path_factory.mktemp("whole")
    return numbers(train(small_config(root), dataset, root / "run")), root / "run"


@pytest.mark.parametrize("stopped_after", [1, 7, 10, 13])
def test_stopped_and_started_again_is_bit_for_bit_the_same(
    dataset, left_alone, tmp_path, stopped_after
):
    config = small_config(tmp_path)
    whole, whole_folder = left_alone
    first = []

    def stop():
        return any(record.step == stopped_after for record in first)

    first.extend(train(config, dataset, tmp_path / "parts", stop))
    assert latest_checkpoint(tmp_path / "parts").step == stopped_after
    rest = numbers(train(config, dataset, tmp_path / "parts"))
    first = numbers(first)
    if stopped_after == 10:  # an evaluation is done again after a start
        assert rest[0] == first.pop()
    assert first + rest == whole
    ours, theirs = weights(tmp_path / "parts"), weights(whole_folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_stop_inside_a_step_drops_that_step(dataset, left_alone, tmp_path):
    config = small_config(tmp_path)
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return asked > 2 * 5 + 1  # before the second micro-batch of step 6

    told = list(train(config, dataset, tmp_path / "parts", stop))
    assert told[-1].step == 5
    rest = list(train(config, dataset, tmp_path / "parts"))
    assert numbers(told + rest) == left_alone[0]


def test_an_error_and_a_consumer_that_leaves_keep_what_is_done(dataset, tmp_path, monkeypatch):
    config = small_config(tmp_path)
    for record in train(config, dataset, tmp_path / "left"):
        if record.step == 7:
            break
    assert latest_checkpoint(tmp_path / "left").step == 7
    real = Stepper.micro_step

    def failing(self, batch):
        if self.batches.position > 6 * 8:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Stepper, "micro_step", failing)
    with pytest.raises(KeyboardInterrupt):
        list(train(config, dataset, tmp_path / "thrown"))
    assert latest_checkpoint(tmp_path / "thrown").step == 6


def test_a_finished_run_has_nothing_left_to_do(dataset, tmp_path):
    config = tiny_config(tmp_path, training__max_steps=4, schedule__warmup_steps=1)
    list(train(config, dataset, tmp_path / "run"))
    assert latest_checkpoint(tmp_path / "run").finished
    assert list(train(config, dataset, tmp_path / "run")) == []


@pytest.mark.parametrize(("batch_size", "grad_acc"), [(1, 8), (2, 4), (4, 2)])
def test_micro_batches_add_up_to_one_big_batch(dataset, tmp_path, batch_size, grad_acc):
    def first_steps(**split):
        config = tiny_config(tmp_path, model__dropout=0.0, training__max_steps=4, **split)
        return [r for r in train(config, dataset, tmp_path / str(split)) if r.loss]

    big = first_steps(training__batch_size=8, training__grad_acc=1)
    small = first_steps(training__batch_size=batch_size, training__grad_acc=grad_acc)
    for ours, theirs in zip(small, big, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)


def test_the_first_loss_and_gradient_are_those_of_plain_torch(dataset, tmp_path):
    config = tiny_config(tmp_path, model__dropout=0.0, training__max_steps=4)
    record = list(train(config, dataset, tmp_path / "run"))[1]
    stepper = Stepper(config, dataset)
    inputs, targets = stepper.batches.next_batch(8)
    logits = stepper.model(inputs) @ stepper.model.head.T
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(loss, list(stepper.model.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    assert record.grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_a_device_that_is_not_there_is_a_config_error(dataset, tmp_path):
    with pytest.raises(ConfigError, match=r"hardware.device = cuda:99"):
        Trainer(tiny_config(tmp_path, hardware__device="cuda:99"), dataset, tmp_path / "run")


class TestRunFolder:
    def test_starting_is_resuming(self, dataset, tmp_path):
        config = tiny_config(tmp_path)
        folder = open_run_dir(config, dataset)
        assert open_run_dir(config, dataset) == folder
        assert folder.parent == tmp_path / "train"
        assert folder.name.startswith("t-")

    def test_what_does_not_shape_the_weights_may_change(self, dataset, tmp_path):
        folder = open_run_dir(tiny_config(tmp_path), dataset)
        split = {"training__batch_size": 2, "training__grad_acc": 4}
        for change in (split, {"training__log_interval": 3}, {"evaluation__interval": 5}):
            assert open_run_dir(tiny_config(tmp_path, **change), dataset) == folder

    def test_an_interrupted_run_may_be_given_more_steps(self, dataset, tmp_path):
        folder = open_run_dir(tiny_config(tmp_path), dataset)
        longer = tiny_config(tmp_path, training__max_steps=30)
        assert open_run_dir(longer, dataset) == folder

    def test_a_finished_run_stays_as_it_is(self, dataset, tmp_path):
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
    def test_another_model_or_optimizer_is_another_run(self, dataset, tmp_path, change):
        folder = open_run_dir(tiny_config(tmp_path), dataset)
        assert open_run_dir(tiny_config(tmp_path, **change), dataset) != folder
