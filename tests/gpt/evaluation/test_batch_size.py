"""Running out of memory: survived, at any point, with the curve of the smaller batch."""

import pytest
import torch
from training_data import make_token_dataset, numbers, tiny_config

from gpt.errors import OutOfMemoryError
from gpt.evaluation import heldout
from gpt.training import step
from gpt.training.loop import never_stop, train
from gpt.training.step import Stepper


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


class FullDevice:
    """A device that is out of memory for batches above `limit`, from the n-th micro-step on."""

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


def without_batch_size(told):
    import dataclasses

    return [dataclasses.replace(record, batch_size=None) for record in numbers(told)]


def test_at_the_first_step_it_goes_on_as_if_started_smaller(dataset, tmp_path, monkeypatch, caplog):
    smaller = numbers(records(tmp_path, dataset, "small", **SMALL))
    device = FullDevice(monkeypatch, limit=2)
    fitted = numbers(records(tmp_path, dataset, "fitted", **BIG))
    assert device.refused == 2  # 8 and 4 in the trial, nothing later
    assert fitted == smaller
    assert "batch_size 8 -> 4, grad_acc 1 -> 2" in caplog.text


@pytest.mark.parametrize("after", [2 + 3, 2 + 2 * 4 + 1])
def test_in_the_middle_the_step_is_done_again_smaller(dataset, tmp_path, monkeypatch, after):
    """The trial takes two micro-steps; then the device shrinks at step 4, or inside step 5."""
    split = {"training__batch_size": 4, "training__grad_acc": 2} if after > 6 else BIG
    undisturbed = records(tmp_path, dataset, "whole", model__dropout=0.0, **split)
    device = FullDevice(monkeypatch, limit=2, after=after)
    survived = records(tmp_path, dataset, "survived", model__dropout=0.0, **split)
    assert device.refused >= 1
    assert [record.batch_size for record in survived if record.loss][-1] == 2
    survived, undisturbed = ([r for r in told if r.loss] for told in (survived, undisturbed))
    for ours, theirs in zip(survived, undisturbed, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


def test_in_an_evaluation_the_result_is_the_same(dataset, tmp_path, monkeypatch, caplog):
    whole = numbers(records(tmp_path, dataset, "whole", **SMALL))
    real = heldout.token_losses

    def limited(hidden, *rest):
        if hidden.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(hidden, *rest)

    monkeypatch.setattr(heldout, "token_losses", limited)
    survived = numbers(records(tmp_path, dataset, "survived", **SMALL))
    for ours, theirs in zip(survived, whole, strict=True):
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
        if theirs.validation:
            assert ours.validation.loss == pytest.approx(theirs.validation.loss, rel=1e-6)
    assert "out of memory in evaluation" in caplog.text


def test_one_sequence_too_many_is_one_clear_error(dataset, tmp_path, monkeypatch):
    FullDevice(monkeypatch, limit=0)
    with pytest.raises(OutOfMemoryError, match="activation_checkpointing"):
        records(tmp_path, dataset, "run", **SMALL)


def test_the_trial_leaves_no_trace(dataset, tmp_path):
    config = tiny_config(tmp_path)
    tried, untried = Stepper(config, dataset), Stepper(config, dataset)
    state = torch.get_rng_state()
    tried.fit()
    assert torch.equal(torch.get_rng_state(), state)
    assert tried.batches.position == 0
    assert not any(optimizer.state for optimizer in tried.optimizers)
    for ours, theirs in zip(tried.model.parameters(), untried.model.parameters(), strict=True):
        assert ours.grad is None
        assert torch.equal(ours, theirs)


def test_nothing_waits_for_the_device_between_micro_steps(dataset, tmp_path):
    """What would make a GPU wait (`item`, a copy to the host) does not occur in a trace of the
    accumulation, and does occur, as the control, when the step's numbers are read."""
    one = Stepper(tiny_config(tmp_path, training__grad_acc=3), dataset)

    def operations(work):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
            result = work()
        return {event.key for event in trace.key_averages()}, result

    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}
    seen, loss = operations(lambda: one._accumulated(never_stop))
    assert "aten::embedding" in seen
    assert not seen & waiting
    seen, _ = operations(loss.item)
    assert seen & waiting
