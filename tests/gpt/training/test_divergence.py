"""Diverging training: skipped steps, rollbacks, excluded batches, and giving up in the end."""

import math

import pytest
import torch
from training_data import make_token_dataset, numbers, small_config, weights

from gpt.errors import NonFiniteLossError
from gpt.training import divergence
from gpt.training.checkpoint.retention import latest_checkpoint, latest_valid_checkpoint
from gpt.training.divergence import (
    SPIKE_WINDOW,
    DivergenceGuard,
    find_spike,
    read_recoveries,
)
from gpt.training.loop import train
from gpt.training.step import TrainState

NAN = float("nan")
PER_STEP = 8
"""Sequences per step in `small_config`."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


def inject(monkeypatch, spoil, when):
    """Replace the loss of each micro-batch by `spoil(state, loss)` if `when(state)`."""
    real = TrainState.forward_backward

    def forward_backward(self, batch, **named):
        loss = real(self, batch, **named)
        return spoil(self, loss) if when(self) else loss

    monkeypatch.setattr(TrainState, "forward_backward", forward_backward)


def nan_loss(_, loss):
    return loss * NAN


def nan_gradient(state, loss):
    state.model.head.grad[0, 0] = NAN
    return loss


def infinite_gradient(state, loss):
    state.model.head.grad[0, 0] = math.inf
    return loss


SPOILERS = [nan_loss, nan_gradient, infinite_gradient]


def reads_data_of(*steps):
    """Whether the sequences being read are those of `steps`, counted by position in the data."""
    return lambda state: math.ceil(state.loader.position / PER_STEP) in steps


@pytest.mark.parametrize("spoil", SPOILERS)
def test_single_non_finite_step_is_skipped(dataset, tmp_path, monkeypatch, caplog, spoil):
    inject(monkeypatch, spoil, reads_data_of(7))
    records = train(small_config(tmp_path), dataset, tmp_path / "run")
    steps = [record for record in records if not record.validation]
    assert [record.step for record in steps] == list(range(1, 21))
    assert [record.step for record in steps if record.loss is None] == [7]
    assert steps[-1].skipped_steps == 1
    assert steps[-1].recoveries == 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    assert "step 7 is skipped" in caplog.text


def test_skipped_step_changes_no_weights_or_optimizer_states(dataset, tmp_path, monkeypatch):
    config = small_config(
        tmp_path,
        training__max_steps=4,
        training__checkpoint_interval=1,
        training__checkpoints_kept=4,
    )
    inject(monkeypatch, nan_loss, reads_data_of(3))
    list(train(config, dataset, tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints"
    for name in ("model.safetensors", "optimizer.safetensors"):
        before, after = (folder / f"step-0000000{n}" / name for n in (2, 3))
        assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize("spoil", SPOILERS)
def test_repeated_skips_roll_back_and_exclude_batches(
    dataset, tmp_path, monkeypatch, caplog, spoil
):
    """The data of three steps is bad: the run rolls back to step 10 and excludes it."""
    inject(monkeypatch, spoil, reads_data_of(13, 14, 15))
    records = list(train(small_config(tmp_path), dataset, tmp_path / "run"))
    steps = [record.step for record in records if not record.validation]
    assert steps == [*range(1, 16), *range(11, 21)]
    assert [record.step for record in records if record.validation] == [0, 10, 20]
    recoveries = read_recoveries(tmp_path / "run")
    assert [(r.step, r.back_to_step, r.sequences_passed_over) for r in recoveries] == [
        (15, 10, (12 * PER_STEP, 15 * PER_STEP))
    ]
    assert records[-2].recoveries == 1
    assert "Rolling back to step 10 and excluding 24 sequences" in caplog.text
    assert latest_valid_checkpoint(tmp_path / "run").finished


def test_rollback_before_the_first_checkpoint_restarts(dataset, tmp_path, monkeypatch):
    inject(monkeypatch, nan_loss, reads_data_of(3, 4, 5))
    steps = [r.step for r in train(small_config(tmp_path), dataset, tmp_path / "run") if r.loss]
    assert steps == [1, 2, *range(1, 21)]


def test_run_after_rollback_equals_a_run_without_those_batches(dataset, tmp_path, monkeypatch):
    """As if the data had never contained them; the same if the run is interrupted after it."""
    config = small_config(tmp_path)
    excluded = [(12 * PER_STEP, 15 * PER_STEP)]
    with monkeypatch.context() as patch:
        patch.setattr(
            DivergenceGuard,
            "exclude_batches",
            lambda self: self._state.loader.exclude_ranges(excluded),
        )
        list(train(config, dataset, tmp_path / "without"))
    inject(monkeypatch, nan_loss, reads_data_of(13, 14, 15))
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
    ("spoil", "attempts"), [(nan_loss, 0), (nan_gradient, 1), (infinite_gradient, 3)]
)
def test_lasting_divergence_fails_and_keeps_the_last_good_checkpoint(
    dataset, tmp_path, monkeypatch, spoil, attempts
):
    config = small_config(
        tmp_path, training__recovery_attempts=attempts, training__checkpoint_interval=5
    )
    inject(monkeypatch, spoil, lambda state: state.loader.position > 12 * PER_STEP)
    with pytest.raises(NonFiniteLossError, match=r"optimizer\.learning_rate"):
        list(train(config, dataset, tmp_path / "run"))
    assert len(read_recoveries(tmp_path / "run")) == attempts
    assert latest_valid_checkpoint(tmp_path / "run").step == 10
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_non_finite_weights_are_never_saved(dataset, tmp_path, monkeypatch):
    """The update of step 10, whose checkpoint is due, makes a weight NaN."""
    real, has_spoiled = TrainState.update_weights, []

    def update_weights(self):
        real(self)
        if self.loader.position == 10 * PER_STEP and not has_spoiled:
            has_spoiled.append(True)
            with torch.no_grad():
                self.model.head[0, 0] = NAN

    monkeypatch.setattr(TrainState, "update_weights", update_weights)
    list(train(small_config(tmp_path), dataset, tmp_path / "run"))
    assert has_spoiled
    (recovery,) = read_recoveries(tmp_path / "run")
    assert recovery.sequences_passed_over == (9 * PER_STEP, 10 * PER_STEP)
    assert latest_checkpoint(tmp_path / "run").finished
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


class TestSpikes:
    @pytest.fixture(autouse=True)
    def short_window(self, monkeypatch):
        monkeypatch.setattr(divergence, "SPIKE_WINDOW", 8)

    @staticmethod
    def high_loss(_, loss):
        return loss + 100.0

    def test_spike_rolls_back_and_excludes_its_batch(self, dataset, tmp_path, monkeypatch, caplog):
        inject(monkeypatch, self.high_loss, reads_data_of(14))
        records = list(train(small_config(tmp_path), dataset, tmp_path / "run"))
        assert [r.step for r in records if r.loss] == [*range(1, 15), *range(11, 21)]
        (recovery,) = read_recoveries(tmp_path / "run")
        assert recovery.sequences_passed_over == (13 * PER_STEP, 14 * PER_STEP)
        assert "is a spike" in caplog.text

    def test_lasting_spike_is_accepted(self, dataset, tmp_path, monkeypatch, caplog):
        inject(monkeypatch, self.high_loss, lambda state: state.loader.position > 12 * PER_STEP)
        records = list(train(small_config(tmp_path), dataset, tmp_path / "run"))
        assert records[-1].step == 20
        assert len(read_recoveries(tmp_path / "run")) == 3
        assert "training continues" in caplog.text

    def test_sigma_0_disables_detection(self, dataset, tmp_path, monkeypatch):
        inject(monkeypatch, self.high_loss, reads_data_of(14))
        config = small_config(tmp_path, training__spike_sigma=0.0)
        records = list(train(config, dataset, tmp_path / "run"))
        assert [r.step for r in records if r.loss] == list(range(1, 21))


def test_falling_loss_with_noise_is_not_a_spike():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5_000, generator=generator) * 0.05
    losses = [11 * 0.999**step + 3 + float(noise[step]) for step in range(5_000)]
    last = [losses[max(0, step - SPIKE_WINDOW) : step] for step in range(5_001)]
    spikes = [find_spike(loss, before, 6.0) for loss, before in zip(losses, last, strict=False)]
    assert spikes == [None] * 5_000
    assert "is a spike" in find_spike(losses[-1] + 1.0, last[-1], 6.0)


def test_float16_overflow_is_left_to_the_scaler(dataset, tmp_path):
    """The update is skipped and the scale halved; only a scale below 1 is a problem."""
    state = TrainState(small_config(tmp_path), dataset)
    state.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=4.0)
    before = [parameter.detach().clone() for parameter in state.model.parameters()]

    def overflow():
        state.forward_backward(state.loader.next_batch(4))
        state.model.head.grad[0, 0] = math.inf
        return state.clip_gradients(torch.tensor(5.0))

    for scale in (4.0, 2.0, 1.0):
        assert state.scaler.get_scale() == scale
        loss, grad_norm = overflow()
        assert loss == 5.0
        assert not math.isfinite(grad_norm)
        assert state.scale_was_too_large()
        state.skip_update()
    assert all(map(torch.equal, before, state.model.parameters()))
    overflow()
    assert not state.scale_was_too_large()


def test_spike_detection_does_not_change_a_normal_run(dataset, tmp_path):
    config, off = small_config(tmp_path), small_config(tmp_path, training__spike_sigma=0.0)
    assert numbers(train(config, dataset, tmp_path / "a")) == numbers(
        train(off, dataset, tmp_path / "b")
    )
