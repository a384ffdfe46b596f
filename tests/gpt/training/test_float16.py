"""The gradient scaler of float16, on the CPU: its code is the same as on a GPU."""

import json
import math

import pytest
import torch
from training_data import make_token_dataset, numbers, small_config, weights

from gpt.files import compute_sha256
from gpt.training import step
from gpt.training.checkpoint.retention import latest_checkpoint, read_progress
from gpt.training.divergence import read_recoveries
from gpt.training.loop import fit, setup, train
from gpt.training.step import TrainState


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def float16(monkeypatch):
    monkeypatch.setattr(step, "compute_dtype", lambda *_: torch.float16)


def scaler_of(folder):
    return read_progress(latest_checkpoint(folder).folder).scaler


def edit_progress(checkpoint, **changes):
    """Change what a checkpoint's `progress.json` holds, as an older version would have written."""
    path, marker = checkpoint / "progress.json", checkpoint / "COMPLETE"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    checksums = json.loads(marker.read_text())
    marker.write_text(json.dumps(checksums | {path.name: compute_sha256(path)}))


@pytest.mark.usefixtures("float16")
@pytest.mark.parametrize("as_floats", [False, True])
def test_resumed_run_equals_an_uninterrupted_one(dataset, tmp_path, as_floats):
    config = small_config(tmp_path, training__max_steps=8, training__checkpoint_interval=4)
    whole = numbers(train(config, dataset, tmp_path / "whole"))
    parts = train(config, dataset, tmp_path / "parts")
    first = [next(parts) for _ in range(5)]
    parts.close()
    checkpoint = latest_checkpoint(tmp_path / "parts").folder
    saved = scaler_of(tmp_path / "parts")
    assert saved["scale"] == 65536
    assert isinstance(saved["growth_interval"], int)
    if as_floats:  # as version 0.1 wrote them
        edit_progress(checkpoint, scaler={key: float(value) for key, value in saved.items()})
    assert numbers(first) + numbers(train(config, dataset, tmp_path / "parts")) == whole
    assert scaler_of(tmp_path / "parts") == scaler_of(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "parts")[name], tensor)


def test_scale_grows_after_a_resume(dataset, tmp_path, float16):
    """The interval of growth survives the checkpoint, and so does the count of steps towards it."""
    state = TrainState(small_config(tmp_path), dataset)
    state.scaler.set_growth_interval(3)
    folder = tmp_path / "run"
    folder.mkdir()
    steps = fit(state, folder)
    for record in steps:
        if record.step == 2:
            break
    steps.close()
    resumed = setup(state.config, dataset, folder)
    for record in fit(resumed, folder):
        if record.step == 3:
            break
    assert resumed.scaler.get_scale() == 2 * 65536


@pytest.mark.parametrize("float16_first", [False, True])
def test_checkpoint_resumes_on_a_device_with_another_type(
    dataset, tmp_path, monkeypatch, float16_first
):
    config = small_config(tmp_path, training__max_steps=4, training__checkpoint_interval=2)
    for steps, has_float16 in ((2, float16_first), (4, not float16_first)):
        dtype = torch.float16 if has_float16 else torch.bfloat16
        monkeypatch.setattr(step, "compute_dtype", lambda *_, dtype=dtype: dtype)
        for record in train(config, dataset, tmp_path / "run"):
            if record.step == steps and record.loss:
                break
        assert bool(scaler_of(tmp_path / "run")) == has_float16
    assert latest_checkpoint(tmp_path / "run").step == 4


PARAMETERS = {
    "block": ("nanochat", "layers.0.mlp.fc1.weight"),
    "embedding": ("nanochat", "embed_tokens.weight"),
    "head": ("nanochat", "lm_head.weight"),
    "vector": ("gpt2", "h.0.ln_1.weight"),
}


def spoil_gradient(monkeypatch, name, steps, value=math.inf):
    """Write `value` into the gradient of a parameter while one of `steps` is computed."""
    real = TrainState.clip_gradients

    def clip_gradients(self, loss):
        if self.step + 1 in steps:
            dict(self.model.named_parameters())[name].grad.view(-1)[0] = value
        return real(self, loss)

    monkeypatch.setattr(TrainState, "clip_gradients", clip_gradients)


@pytest.mark.usefixtures("float16")
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
@pytest.mark.parametrize("where", PARAMETERS)
def test_overflow_in_one_optimizer_stops_the_other_too(
    dataset, tmp_path, monkeypatch, where, grad_clip
):
    architecture, name = PARAMETERS[where]
    config = small_config(
        tmp_path,
        model__architecture=architecture,
        optimizer__name="muon",
        optimizer__grad_clip=grad_clip,
        training__max_steps=4,
    )
    spoil_gradient(monkeypatch, name, steps=[3])
    (tmp_path / "run").mkdir()
    state = setup(config, dataset, tmp_path / "run")
    assert len(state.optimizers) == 2
    scale, saved = {}, {}
    for record in fit(state, tmp_path / "run"):
        saved[record.step] = [parameter.detach().clone() for parameter in state.model.parameters()]
        scale[record.step] = state.scaler.get_scale()
        if record.step == 3:
            assert record.loss is not None
            assert record.grad_norm is None
            assert record.skipped_steps == 1
    assert all(map(torch.equal, saved[3], saved[2]))
    assert not any(map(torch.equal, saved[4], saved[3]))
    assert all(tensor.isfinite().all() for tensor in saved[4])
    assert scale == {0: 65536, 1: 65536, 2: 65536, 3: 32768, 4: 32768}


@pytest.mark.usefixtures("float16")
def test_loss_that_is_not_finite_skips_one_step(dataset, tmp_path, monkeypatch):
    real = TrainState.forward_backward

    def forward_backward(self, batch, **named):
        loss = real(self, batch, **named)
        return loss * math.nan if self.step == 2 else loss

    monkeypatch.setattr(TrainState, "forward_backward", forward_backward)
    records = list(train(small_config(tmp_path), dataset, tmp_path / "run"))
    steps = [record for record in records if not record.validation]
    assert [record.step for record in steps if record.loss is None] == [3]
    assert steps[-1].step == 20
    assert steps[-1].recoveries == 0


@pytest.mark.usefixtures("float16")
@pytest.mark.parametrize(("overflows", "bad", "back_to"), [(2, 3, 0), (12, 13, 10)])
def test_rollback_restores_the_scale(dataset, tmp_path, monkeypatch, overflows, bad, back_to):
    """The data of one step overflow and halve the scale, those of the next three give no loss.

    After the rollback the overflow comes again; without it, the scale would be halved twice.
    """
    clip_gradients = TrainState.clip_gradients

    def clip(self, loss):
        data = self.loader.position // 8
        if data == overflows:
            self.model.head.grad[0, 0] = math.inf
        return clip_gradients(self, loss * math.nan if bad <= data < bad + 3 else loss)

    monkeypatch.setattr(TrainState, "clip_gradients", clip)
    folder = tmp_path / "run"
    list(train(small_config(tmp_path), dataset, folder))
    (recovery,) = read_recoveries(folder)
    assert recovery.back_to_step == back_to
    assert scaler_of(folder)["scale"] == 65536 / 2
