"""Out of memory in training: the run continues with smaller micro-batches and the same losses."""

import pytest
import torch
from training_data import make_token_dataset, numbers, tiny_config

from gpt.errors import OutOfMemoryError
from gpt.evaluation import heldout
from gpt.training import step
from gpt.training.loop import train
from gpt.training.out_of_memory import find_batch_size
from gpt.training.step import TrainState


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


class FullDevice:
    """A device that runs out of memory for micro-batches above `limit`, after `after` of them."""

    def __init__(self, monkeypatch, limit, after=0):
        self.limit, self.after, self.calls, self.refused = limit, after, 0, 0
        real = step.linear_cross_entropy

        def limited(hidden, *rest):
            loss = real(hidden, *rest)
            self.calls += 1
            if self.calls > self.after and hidden.shape[0] > self.limit:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            return loss

        monkeypatch.setattr(step, "linear_cross_entropy", limited)


def records(tmp_path, dataset, name, **split):
    config = tiny_config(tmp_path, training__max_steps=6, **split)
    return list(train(config, dataset, tmp_path / name))


BIG = {"training__batch_size": 8, "training__grad_acc": 1}
SMALL = {"training__batch_size": 2, "training__grad_acc": 4}


def test_oom_in_trial_trains_like_a_smaller_batch_size(dataset, tmp_path, monkeypatch, caplog):
    smaller = numbers(records(tmp_path, dataset, "small", **SMALL))
    device = FullDevice(monkeypatch, limit=2)
    fitted = numbers(records(tmp_path, dataset, "fitted", **BIG))
    assert device.refused == 2  # 8 and 4 in the trial, nothing later
    assert fitted == smaller
    assert "batch_size 8 -> 4, grad_acc 1 -> 2" in caplog.text


@pytest.mark.parametrize("after", [2 + 3, 2 + 2 * 4 + 1])
def test_oom_later_repeats_the_step_with_a_smaller_batch(dataset, tmp_path, monkeypatch, after):
    """After the two micro-batches of the trial, memory shrinks at step 4, or inside step 5."""
    split = {"training__batch_size": 4, "training__grad_acc": 2} if after > 6 else BIG
    expected = records(tmp_path, dataset, "expected", model__dropout=0.0, **split)
    device = FullDevice(monkeypatch, limit=2, after=after)
    actual = records(tmp_path, dataset, "actual", model__dropout=0.0, **split)
    assert device.refused >= 1
    assert [record.batch_size for record in actual if record.loss][-1] == 2
    actual, expected = ([r for r in run if r.loss] for run in (actual, expected))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


def test_oom_in_evaluation_does_not_change_the_result(dataset, tmp_path, monkeypatch, caplog):
    expected = numbers(records(tmp_path, dataset, "expected", **SMALL))
    real = heldout.score_tokens

    def limited(hidden, *rest):
        if hidden.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(hidden, *rest)

    monkeypatch.setattr(heldout, "score_tokens", limited)
    actual = numbers(records(tmp_path, dataset, "actual", **SMALL))
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
        if theirs.validation:
            assert ours.validation.loss == pytest.approx(theirs.validation.loss, rel=1e-6)
    assert "out of memory in evaluation" in caplog.text


def test_oom_with_one_sequence_is_an_error(dataset, tmp_path, monkeypatch):
    FullDevice(monkeypatch, limit=0)
    with pytest.raises(OutOfMemoryError, match="activation_checkpointing"):
        records(tmp_path, dataset, "run", **SMALL)


def test_trial_leaves_the_state_unchanged(dataset, tmp_path):
    config = tiny_config(tmp_path)
    tried, untried = TrainState(config, dataset), TrainState(config, dataset)
    random_state = torch.get_rng_state()
    find_batch_size(tried)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert tried.loader.position == 0
    assert tried.evaluated_step is None
    assert not any(optimizer.state for optimizer in tried.optimizers)
    for ours, theirs in zip(tried.model.parameters(), untried.model.parameters(), strict=True):
        assert ours.grad is None
        assert torch.equal(ours, theirs)


def test_trial_that_fails_late_leaves_no_optimizer_states(dataset, tmp_path, monkeypatch):
    """Out of memory in the second micro-batch, when optimizer states are allocated already."""
    state = TrainState(tiny_config(tmp_path, **BIG), dataset)
    FullDevice(monkeypatch, limit=2, after=1)
    find_batch_size(state)
    assert state.batch_size == 2
    assert state.is_consistent
    assert not any(optimizer.state for optimizer in state.optimizers)


def test_micro_batches_do_not_wait_for_the_device(dataset, tmp_path):
    """The operations that make a GPU wait (`item`, a copy to the host) do not occur in a trace of
    the micro-batches, and do occur when the loss is read."""
    state = TrainState(tiny_config(tmp_path, training__grad_acc=3), dataset)
    loss = torch.zeros(())

    def operations(work):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            work()
        return {event.key for event in trace.key_averages()}

    def accumulate():
        nonlocal loss
        for batch, is_last in state.micro_batches():
            loss += state.forward_backward(batch, sync_gradients=is_last)

    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}
    operations_of_step = operations(accumulate)
    assert "aten::embedding" in operations_of_step
    assert not operations_of_step & waiting
    assert operations(loss.item) & waiting
