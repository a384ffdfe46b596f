"""A night in small on a card: train, stop, resume, finish, generate, evaluate and export."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_data import make_token_dataset, tiny_config

from gpt.evaluation.heldout import score_texts
from gpt.exchange.huggingface import export_huggingface
from gpt.exchange.model_card import ModelCardData
from gpt.hardware.device import compute_dtype
from gpt.model.generate import SamplingParams, generate
from gpt.model.io import load_model
from gpt.training.checkpoint.retention import latest_checkpoint, read_progress
from gpt.training.loop import setup, train

MUON = {"model__architecture": "nanochat", "optimizer__name": "muon", "model__dropout": 0.0}
BF16, FP16, FP32 = ({"training__dtype": name} for name in ("bfloat16", "float16", "float32"))
CHECKPOINTING = {"training__activation_checkpointing": True}
COMPILE = {"training__compile": True}
# Heads of 60 are padded for attention kernels, and not on every card.
HEADS_OF_60 = {"model__n_head": 1, "model__n_embd": 60}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


def cuda_config(root, *changes):
    merged = {key: value for part in changes for key, value in part.items()}
    steps = {
        "training__max_steps": 6,
        "training__checkpoint_interval": 5,
        "evaluation__interval": 3,
    }
    return tiny_config(root, **{"hardware__device": "cuda", **steps, **merged})


def on(*cards):
    return pytest.mark.cards(*cards)


EVERY_CARD = on("rtx4070", "rtx3060", "t4", "h100", "rtx5070")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([BF16], id="gpt2-bfloat16", marks=EVERY_CARD),
        pytest.param([MUON, BF16, CHECKPOINTING], id="nanochat-bfloat16", marks=EVERY_CARD),
        pytest.param([FP16, CHECKPOINTING, HEADS_OF_60], id="gpt2-float16", marks=on("t4")),
        pytest.param([MUON, FP16, HEADS_OF_60], id="nanochat-float16", marks=on("rtx3060", "t4")),
        pytest.param([FP32], id="gpt2-float32", marks=on("rtx4070", "t4")),
        pytest.param([MUON, FP32], id="nanochat-float32", marks=on("h100")),
        pytest.param([BF16, COMPILE], id="gpt2-bfloat16-compiled", marks=on("rtx4070")),
        pytest.param(
            [MUON, BF16, COMPILE, HEADS_OF_60], id="nanochat-bfloat16-compiled", marks=on("rtx3060")
        ),
        pytest.param(
            [MUON, BF16, COMPILE, CHECKPOINTING],
            id="nanochat-bfloat16-checkpointing-compiled",
            marks=on("h100"),
        ),
        pytest.param([FP16, COMPILE], id="gpt2-float16-compiled", marks=on("t4")),
        pytest.param([MUON, FP32, COMPILE], id="nanochat-float32-compiled", marks=on("rtx5070")),
    ],
)
def test_run_resumes_finishes_and_its_model_is_used(dataset, tmp_path, changes):
    config, folder = cuda_config(tmp_path, *changes), tmp_path / "run"
    first = []
    running = train(config, dataset, folder)
    for record in running:
        first.append(record)
        if record.step == 4:
            break
    running.close()
    stopped = latest_checkpoint(folder)
    assert stopped.step == 4
    is_float16 = compute_dtype(torch.device("cuda"), config.training.dtype) == torch.float16
    assert bool(read_progress(stopped.folder).scaler) == is_float16

    resumed = setup(config, dataset, folder)
    for name, tensor in load_file(stopped.folder / "model.safetensors").items():
        assert torch.equal(resumed.model.state_dict()[name].cpu(), tensor)
    last = list(train(config, dataset, folder))
    steps = [record.step for record in [*first, *last] if record.validation is None]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [r.step for r in [*first, *last] if r.validation] == [0, 3, 6]
    done = [record for record in last if record.validation is None]
    assert all(record.loss is not None and record.peak_memory_bytes > 0 for record in done)
    assert all(record.batch_size == config.training.batch_size for record in done)
    assert all(record.energy_joules > 0 for record in done)
    if config.training.dtype != "float32":  # for which some cards have no tensor cores
        assert all(record.mfu is not None for record in done)

    finished = latest_checkpoint(folder)
    assert finished.finished
    model = load_model(finished.folder, "cuda")
    assert isinstance(generate(model, "The", SamplingParams(max_tokens=40)), str)
    assert score_texts(model, ["Some text."], dtype=config.training.dtype).tokens > 0
    export_huggingface(finished.folder, tmp_path / "exported", ModelCardData(name="t"))
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert exported["architectures"]
