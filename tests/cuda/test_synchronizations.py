"""How often the host waits for the device: once per step, for its loss and gradient norm."""

import pytest
import torch
from training_data import make_token_dataset, tiny_config

from gpt.training.loop import train
from gpt.training.optimizer import apply_schedule
from gpt.training.out_of_memory import find_batch_size
from gpt.training.step import TrainState

NANOCHAT = {"model__architecture": "nanochat", "optimizer__name": "muon", "model__dropout": 0.0}
CASES = [
    pytest.param({}, id="gpt2"),
    pytest.param({"training__activation_checkpointing": True}, id="gpt2-checkpointing"),
    pytest.param(NANOCHAT, id="nanochat"),
    pytest.param({"training__dtype": "float16"}, id="gpt2-float16"),
    pytest.param({**NANOCHAT, "training__dtype": "float16"}, id="nanochat-float16"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


def cuda_config(root, **changes):
    return tiny_config(root, hardware__device="cuda", training__grad_acc=4, **changes)


@pytest.mark.parametrize("changes", CASES)
def test_only_clipping_waits_within_a_step(card, dataset, tmp_path, changes):
    state = TrainState(cuda_config(tmp_path, **changes), dataset)
    find_batch_size(state)
    for _ in range(2):  # what is made once is made in the first step
        apply_schedule(state.optimizers, state.config, state.step)
        loss = torch.zeros((), device=state.device)
        with card.counting() as in_micro_batches:
            for batch, is_last in state.micro_batches():
                loss += state.forward_backward(batch, sync_gradients=is_last)
        with card.counting() as in_clipping:
            state.clip_gradients(loss)
        with card.counting() as in_update:
            state.update_weights()
    assert in_micro_batches.launches > 100
    assert (in_micro_batches.synchronizations, in_micro_batches.copies_to_host) == (0, 0)
    assert (in_clipping.synchronizations, in_clipping.copies_to_host) == (1, 1)
    assert in_update.launches > 0
    assert (in_update.synchronizations, in_update.copies_to_host) == (0, 0)


@pytest.mark.parametrize("changes", CASES)
def test_loop_waits_once_per_step(card, dataset, tmp_path, changes):
    running = train(cuda_config(tmp_path, **changes), dataset, tmp_path / "run")
    for record in running:
        if record.step == 2:
            break
    with card.counting() as in_three_steps:
        assert [next(running).step for _ in range(3)] == [3, 4, 5]
    running.close()
    assert (in_three_steps.synchronizations, in_three_steps.copies_to_host) == (3, 3)
