"""The preflight's memory estimate against torch's allocator, for the shipped shapes."""

import gc

import pytest
import torch
from step_memory import make_config
from training_data import make_token_dataset

from gpt.hardware.gpus import find_gpu
from gpt.preflight.memory import estimate_memory
from gpt.training.optimizer import apply_schedule
from gpt.training.step import TrainState

CHECKPOINTING = {"activation_checkpointing": True}
DROPOUT = {"dropout": 0.1}
EAGER = [
    *((name, width, {}) for name in ("gpt2", "nanochat") for width in (480, 576, 720, 768)),
    *((name, 720, extra) for name in ("gpt2", "nanochat") for extra in (CHECKPOINTING, DROPOUT)),
    *((name, 720, {"dtype": "float32", "batch_size": 8}) for name in ("gpt2", "nanochat")),
]
COMPILED = [
    ("gpt2", 720, DROPOUT),
    ("gpt2", 576, CHECKPOINTING),
    ("nanochat", 480, {}),
    ("nanochat", 720, CHECKPOINTING),
]


@pytest.fixture(autouse=True)
def expandable_segments():
    """The allocator as a run sets it up; otherwise it leaves a part of many blocks unused."""
    torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    yield
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"), 40_000, 40_000, 50_000)


def measure_bytes(config, dataset):
    """Measure the peaks of the second of two steps and of an evaluation of two batches."""
    state = TrainState(config, dataset)
    for step in range(2):
        apply_schedule(state.optimizers, config, step)
        torch.cuda.reset_peak_memory_stats()
        for batch, is_last in state.micro_batches():
            loss = state.forward_backward(batch, is_last)
        del batch
        state.clip_gradients(loss)
        state.update_weights()
    training = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    state.evaluate(2 * config.evaluation.batch_size * config.model.block_size)
    return {"training": training, "evaluation": torch.cuda.max_memory_allocated()}


def check_estimates(cases, n_layer, dataset, capsys, **training):
    """Print the worst of all cases and fail if it is 2% or more."""
    gpu = find_gpu(torch.cuda.get_device_name())
    errors = {}
    for name, width, extra in cases:
        settings = {"dtype": "bfloat16", "batch_size": 16, **training, **extra}
        optimizer, batch = {"gpt2": "adamw", "nanochat": "muon"}[name], settings.pop("batch_size")
        size, dtype = (n_layer, 12, width), settings.pop("dtype")
        config = make_config(name, optimizer, dtype, size, (batch, 1024), **settings)
        memory = estimate_memory(config, gpu=gpu)
        estimates = {"training": memory.compiled_bytes, "evaluation": memory.evaluation_bytes}
        torch.compiler.reset()
        gc.collect()  # the state of the case before
        torch.cuda.empty_cache()
        for phase, measured in measure_bytes(config, dataset).items():
            errors[f"{phase} of {name} {width} {extra or ''}"] = estimates[phase] / measured - 1
    worst = max(errors, key=lambda case: abs(errors[case]))
    with capsys.disabled():
        print(f"\nmemory on {gpu.name}: worst of {len(errors)} {errors[worst]:+.2%}, {worst}")
    assert abs(errors[worst]) < 0.02, errors


@pytest.mark.cards("rtx4070", "rtx3060", "t4")
def test_estimate_is_within_two_percent_of_the_allocator(dataset, capsys):
    check_estimates(EAGER, 12, dataset, capsys)


@pytest.mark.cards("rtx4070", "t4")
def test_compiled_estimate_is_within_two_percent_of_the_allocator(dataset, capsys):
    # Few layers, which only add up: compiling takes time in proportion.
    check_estimates(COMPILED, 2, dataset, capsys, compile=True)
