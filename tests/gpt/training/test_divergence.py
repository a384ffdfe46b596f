"""Numbers going wrong: skipped, gone back from, passed over, and given up in the end."""

import math

import pytest
import torch
from training_data import make_token_dataset, numbers, small_config, weights

from gpt.errors import NonFiniteLossError
from gpt.training import divergence
from gpt.training import step as stepper
from gpt.training.checkpoint.retention import latest_checkpoint, latest_valid_checkpoint
from gpt.training.divergence import SpikeDetector, read_recoveries
from gpt.training.loop import train
from gpt.training.step import Stepper

NAN = float("nan")
A_STEP = 8
"""Sequences a step in `small_config`."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


class Injected:
    """What goes wrong in a step, given the position at which its sequences end."""

    def __init__(self, monkeypatch, spoil, when):
        real = Stepper.micro_step

        def micro_step(self, batch):
            share = real(self, batch)
            return spoil(self, share) if when(self) else share

        monkeypatch.setattr(Stepper, "micro_step", micro_step)


def spoil_loss(_, share):
    return share * NAN


def spoil_gradients(one, share):
    one.model.head.grad[0, 0] = NAN
    return share


def spoil_to_infinity(one, share):
    one.model.head.grad[0, 0] = math.inf
    return share


SPOILERS = [spoil_loss, spoil_gradients, spoil_to_infinity]


def sequences_of(*steps):
    """Where the sequences of these steps are read, by their places in the data."""
    return lambda one: math.ceil(one.batches.position / A_STEP) in steps


@pytest.mark.parametrize("spoil", SPOILERS)
def test_one_bad_step_is_skipped_and_counted(dataset, tmp_path, monkeypatch, caplog, spoil):
    Injected(monkeypatch, spoil, sequences_of(7))
    told = [r for r in train(small_config(tmp_path), dataset, tmp_path / "run") if not r.validation]
    assert [record.step for record in told] == list(range(1, 21))
    assert [record.step for record in told if record.loss is None] == [7]
    assert told[-1].skipped_steps == 1
    assert told[-1].recoveries == 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert "step 7 is skipped" in caplog.text


def test_a_skipped_step_leaves_weights_and_states_alone(dataset, tmp_path, monkeypatch):
    config = small_config(tmp_path, training__max_steps=4, training__checkpoint_interval=1)
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"checkpoints_kept": 4})}
    )
    Injected(monkeypatch, spoil_loss, sequences_of(3))
    list(train(config, dataset, tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints"
    for name in ("model.safetensors", "optimizer.safetensors"):
        before, after = (folder / f"step-0000000{n}" / name for n in (2, 3))
        assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize("spoil", SPOILERS)
def test_repeated_ones_are_passed_over_from_a_checkpoint(
    dataset, tmp_path, monkeypatch, caplog, spoil
):
    """Three steps' sequences are bad: the run goes back to step 10 and over them."""
    Injected(monkeypatch, spoil, sequences_of(13, 14, 15))
    told = list(train(small_config(tmp_path), dataset, tmp_path / "run"))
    steps = [record.step for record in told if not record.validation]
    assert steps == [*range(1, 16), *range(11, 21)]
    found = read_recoveries(tmp_path / "run")
    assert [(r.step, r.back_to_step, r.sequences_passed_over) for r in found] == [
        (15, 10, (12 * A_STEP, 15 * A_STEP))
    ]
    assert told[-2].recoveries == 1
    assert "Going back to step 10 and over 24 sequences" in caplog.text
    assert latest_valid_checkpoint(tmp_path / "run").finished


def test_before_the_first_checkpoint_it_goes_back_to_the_start(dataset, tmp_path, monkeypatch):
    Injected(monkeypatch, spoil_loss, sequences_of(3, 4, 5))
    steps = [r.step for r in train(small_config(tmp_path), dataset, tmp_path / "run") if r.loss]
    assert steps == [1, 2, *range(1, 21)]


def test_the_way_on_is_that_of_a_run_without_those_batches(dataset, tmp_path, monkeypatch):
    """As if the data had never held them; and the same again after a kill on the way."""
    config = small_config(tmp_path)
    real = Stepper.__init__

    def without(self, *rest):
        real(self, *rest)
        self.batches.exclude_ranges([(12 * A_STEP, 15 * A_STEP)])

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__init__", without)
        patch.setattr("gpt.training.loop.Trainer._pass_over", lambda _: None)
        list(train(config, dataset, tmp_path / "without"))
    Injected(monkeypatch, spoil_loss, sequences_of(13, 14, 15))
    list(train(config, dataset, tmp_path / "run"))
    parts = train(config, dataset, tmp_path / "parts")
    for record in parts:
        if record.step == 13 and record.recoveries:
            break
    del parts
    list(train(config, dataset, tmp_path / "parts"))
    for name, tensor in weights(tmp_path / "without").items():
        assert torch.equal(weights(tmp_path / "run")[name], tensor)
        assert torch.equal(weights(tmp_path / "parts")[name], tensor)


@pytest.mark.parametrize(
    ("spoil", "attempts"), [(spoil_loss, 0), (spoil_gradients, 1), (spoil_to_infinity, 3)]
)
def test_for_good_it_stops_with_the_last_good_checkpoint_intact(
    dataset, tmp_path, monkeypatch, spoil, attempts
):
    config = small_config(tmp_path, training__recovery_attempts=attempts)
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"checkpoint_interval": 5})}
    )
    Injected(monkeypatch, spoil, lambda one: one.batches.position > 12 * A_STEP)
    with pytest.raises(NonFiniteLossError, match=r"optimizer\.learning_rate"):
        list(train(config, dataset, tmp_path / "run"))
    assert len(read_recoveries(tmp_path / "run")) == attempts
    assert latest_valid_checkpoint(tmp_path / "run").step == 10
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_weights_that_are_not_finite_are_never_written(dataset, tmp_path, monkeypatch):
    """The update of step 10, whose checkpoint is due, spoils them."""
    real, spoiled = Stepper.update, []

    def update(self):
        real(self)
        if self.batches.position == 10 * A_STEP and not spoiled:
            spoiled.append(True)
            with torch.no_grad():
                self.model.head[0, 0] = NAN

    monkeypatch.setattr(Stepper, "update", update)
    list(train(small_config(tmp_path), dataset, tmp_path / "run"))
    assert spoiled
    (found,) = read_recoveries(tmp_path / "run")
    assert found.sequences_passed_over == (9 * A_STEP, 10 * A_STEP)
    assert latest_checkpoint(tmp_path / "run").finished
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


class TestSpikes:
    @pytest.fixture(autouse=True)
    def short_window(self, monkeypatch):
        monkeypatch.setattr(divergence, "WINDOW", 8)

    @staticmethod
    def raised(one, share):
        return share + 100.0

    def test_a_spike_goes_back_and_over_its_batch(self, dataset, tmp_path, monkeypatch, caplog):
        Injected(monkeypatch, self.raised, sequences_of(14))
        told = list(train(small_config(tmp_path), dataset, tmp_path / "run"))
        assert [r.step for r in told if r.loss] == [*range(1, 15), *range(11, 21)]
        (found,) = read_recoveries(tmp_path / "run")
        assert found.sequences_passed_over == (13 * A_STEP, 14 * A_STEP)
        assert "is a spike" in caplog.text

    def test_one_that_stays_is_lived_with(self, dataset, tmp_path, monkeypatch, caplog):
        Injected(monkeypatch, self.raised, lambda one: one.batches.position > 12 * A_STEP)
        told = list(train(small_config(tmp_path), dataset, tmp_path / "run"))
        assert told[-1].step == 20
        assert len(read_recoveries(tmp_path / "run")) == 3
        assert "going on" in caplog.text

    def test_0_turns_it_off(self, dataset, tmp_path, monkeypatch):
        Injected(monkeypatch, self.raised, sequences_of(14))
        config = small_config(tmp_path, training__spike_sigma=0.0)
        told = list(train(config, dataset, tmp_path / "run"))
        assert [r.step for r in told if r.loss] == list(range(1, 21))


def test_a_falling_loss_with_noise_is_no_spike():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5_000, generator=generator) * 0.05
    watch = SpikeDetector(6.0)
    losses = [11 * 0.999**step + 3 + float(noise[step]) for step in range(5_000)]
    assert [watch.taken(loss) for loss in losses] == [None] * 5_000
    assert "is a spike" in watch.taken(losses[-1] + 1.0)


def test_float16_overflow_is_the_scaler_s_business(dataset, tmp_path, monkeypatch):
    """It skips the update and lowers its scale; only a scale under 1 is trouble."""
    one = Stepper(small_config(tmp_path), dataset)
    one.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=4.0)
    monkeypatch.setattr(
        stepper.torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf)
    )
    before = [parameter.detach().clone() for parameter in one.model.parameters()]
    for scale in (4.0, 2.0, 1.0):
        assert one.scaler.get_scale() == scale
        one.micro_step(one.batches.next_batch(4))
        one.model.head.grad[0, 0] = math.inf
        assert one._clipped(torch.tensor(5.0)).usable
        one.update()
    assert all(map(torch.equal, before, one.model.parameters()))
    one.micro_step(one.batches.next_batch(4))
    assert not one._clipped(torch.tensor(5.0)).usable


def test_numbers_come_out_the_same_without_trouble(dataset, tmp_path):
    config, off = small_config(tmp_path), small_config(tmp_path, training__spike_sigma=0.0)
    assert numbers(train(config, dataset, tmp_path / "a")) == numbers(
        train(off, dataset, tmp_path / "b")
    )
