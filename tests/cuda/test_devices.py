"""Which card a run uses, how its allocator is set up, and the peak of its memory."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from training_data import make_token_dataset, tiny_config

from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.loop import train

MIB = 2**20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


@pytest.mark.cards("two_rtx4070")
def test_second_card_draws_dropout_and_its_random_state_is_saved(dataset, tmp_path):
    held_bytes = torch.cuda.memory_allocated(0)
    config = tiny_config(tmp_path, hardware__device="cuda:1", training__max_steps=4)
    list(train(config, dataset, tmp_path / "run"))
    saved = load_file(latest_checkpoint(tmp_path / "run").folder / "random.safetensors")["cuda"]
    first, second = (torch.cuda.get_rng_state(index) for index in range(2))
    assert torch.equal(saved, second)
    assert not torch.equal(saved, first)
    assert torch.cuda.memory_allocated(0) == held_bytes


def test_peak_memory_leaves_out_attempts_that_failed(card, dataset, tmp_path):
    def measure_peak(name, batch_size, limit_bytes=None):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        card.limit_memory(limit_bytes)
        config = tiny_config(
            tmp_path,
            hardware__device="cuda",
            model__block_size=128,
            training__max_steps=4,
            training__batch_size=batch_size,
            training__grad_acc=64 // batch_size,
            evaluation__batch_size=1,
        )
        *_, last, _ = train(config, dataset, tmp_path / name)
        return last.batch_size, last.peak_memory_bytes

    fitting = measure_peak("fitting", 4)
    assert measure_peak("limited", 64, torch.cuda.memory_allocated() + 700 * MIB) == fitting


SHOW_ALLOCATOR = """
import torch
from gpt.hardware.device import pick_device
tensor = torch.empty(2**22, device=pick_device("cuda"))
print({segment["is_expandable"] for segment in torch.cuda.memory_snapshot()})
"""


@pytest.mark.parametrize(
    ("variables", "is_expandable"),
    [({}, True), ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, False)],
)
def test_segments_are_expandable_unless_the_user_sets_the_allocator(variables, is_expandable):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {k: v for k, v in os.environ.items() if k not in names} | variables
    done = subprocess.run(
        [sys.executable, "-c", SHOW_ALLOCATOR], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str({is_expandable}), done.stderr
