"""torch.compile on a card: graphs, recompilation, and the kernels that Triton makes."""

import json
import os
from pathlib import Path

import pytest
import torch
from cards import CARD, CARDS
from torch._dynamo.utils import counters
from training_data import make_token_dataset, tiny_config

from gpt.training.calibration import run_step
from gpt.training.checkpoint.retention import latest_valid_checkpoint
from gpt.training.loop import train
from gpt.training.step import TrainState

NANOCHAT = {"model__architecture": "nanochat", "optimizer__name": "muon", "model__dropout": 0.0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


def compiled_config(root, **changes):
    run = {"hardware__device": "cuda", "training__compile": True, "model__n_layer": 1}
    return tiny_config(root, **{**run, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="gpt2", marks=pytest.mark.cards("rtx4070", "t4")),
        pytest.param(
            NANOCHAT, id="nanochat", marks=pytest.mark.cards("rtx3060", "h100", "rtx5070")
        ),
    ],
)
def test_nothing_recompiles_after_the_first_step(dataset, tmp_path, changes):
    eager = compiled_config(tmp_path, **{**changes, "training__compile": False})
    running = train(eager, dataset, tmp_path / "run")
    next(record for record in running if record.step == 1)
    running.close()
    counters.clear()
    state = TrainState(compiled_config(tmp_path, **changes), dataset)
    run_step(state)
    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        state.evaluate()
        run_step(state)
        state.resume(latest_valid_checkpoint(tmp_path / "run"))
        run_step(state)
        state.model.eval()
        state.model.train()
        run_step(state)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.cards("rtx4070", "rtx3060", "t4", "h100", "rtx5070")
def test_kernels_fit_into_the_shared_memory_of_the_card():
    """Of the kernels that Triton has made for this card so far."""
    card = CARDS[os.environ[CARD]]
    kernels = [
        json.loads(path.read_bytes())
        for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.json")
        if not path.name.startswith("__grp__")
    ]
    assert kernels
    for kernel in kernels:
        assert kernel["target"]["arch"] == int(card.capability.replace(".", ""))
        assert kernel["shared"] <= card.shared_kib_per_block * 1024, kernel["name"]
