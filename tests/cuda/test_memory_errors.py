"""Out of memory on a card: by its size, and by each message that torch has for it."""

import gc

import pytest
import torch
from training_data import make_token_dataset, tiny_config

from gpt.errors import OutOfMemoryError
from gpt.training.loop import train
from gpt.training.out_of_memory import find_batch_size
from gpt.training.step import TrainState

MIB = 2**20
CUDA_OUT_OF_MEMORY = 2
CUBLAS_ALLOC_FAILED = 3
NVML_ERROR_UNKNOWN = 999


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"), 200_000, 60_000)


def cuda_config(root, **changes):
    """A network whose memory depends on the micro-batch more than on anything else."""
    return tiny_config(
        root,
        **{
            "hardware__device": "cuda",
            "model__n_layer": 8,
            "model__n_embd": 128,
            "model__block_size": 512,
            "model__dropout": 0.0,
            "training__batch_size": 32,
            "training__grad_acc": 1,
            "training__max_steps": 4,
            "training__loss_chunk_rows": 256,
            "evaluation__interval": 4,
            "evaluation__tokens": 2048,
            "evaluation__batch_size": 1,
            **changes,
        },
    )


def steps_of(records):
    return [(record.step, record.batch_size) for record in records if record.validation is None]


def peak_bytes(config, dataset, batch_size):
    """What a trial with this micro-batch allocates of the card."""
    state = TrainState(config, dataset)
    state.batch_size = batch_size
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    find_batch_size(state)
    return torch.cuda.max_memory_allocated()


def limit_for(config, dataset, batch_size):
    """A size of the card that is enough for this micro-batch, not for the double of it."""
    enough, double = (peak_bytes(config, dataset, n) for n in (batch_size, 2 * batch_size))
    torch.cuda.empty_cache()
    assert double > enough + 40 * MIB
    return (enough + double) // 2


def test_trial_finds_what_fits_into_the_card(card, dataset, tmp_path):
    config = cuda_config(tmp_path)
    card.limit_memory(limit_for(config, dataset, 8))
    assert steps_of(train(config, dataset, tmp_path / "run")) == [(n, 8) for n in (1, 2, 3, 4)]


def test_step_is_repeated_when_the_card_gets_smaller(card, dataset, tmp_path):
    config = cuda_config(tmp_path)
    limit = limit_for(config, dataset, 8)
    records = []
    for record in train(config, dataset, tmp_path / "run"):
        records.append(record)
        if record.step == 2:
            torch.cuda.empty_cache()
            card.limit_memory(limit)
    assert steps_of(records) == [(1, 32), (2, 32), (3, 8), (4, 8)]


def test_evaluation_is_repeated_with_fewer_sequences(card, dataset, tmp_path, caplog):
    config = cuda_config(tmp_path, evaluation__batch_size=32, evaluation__tokens=32 * 512)
    card.limit_memory(limit_for(cuda_config(tmp_path), dataset, 8))
    records = list(train(config, dataset, tmp_path / "run"))
    assert [record.step for record in records if record.validation] == [0, 4]
    assert steps_of(records)[-1] == (4, 8)
    assert "out of memory in evaluation" in caplog.text


def test_one_sequence_that_does_not_fit_is_an_error(card, dataset, tmp_path):
    card.limit_memory(100 * MIB)
    with pytest.raises(OutOfMemoryError, match="activation_checkpointing"):
        list(train(cuda_config(tmp_path), dataset, tmp_path / "run"))


def test_nothing_of_a_failed_trial_stays_on_the_card(card, dataset, tmp_path):
    state = TrainState(cuda_config(tmp_path), dataset)
    before = torch.cuda.memory_allocated()
    card.limit_memory(limit_for(cuda_config(tmp_path), dataset, 8))
    find_batch_size(state)
    assert torch.cuda.memory_allocated() == before


def train_with_failure_in_step_3(card, function, error, config, dataset, folder):
    records = []
    for record in train(config, dataset, folder):
        records.append(record)
        if record.step == 2:
            torch._C._host_emptyCache()
            card.fail_once(function, error)
    assert card.clear_failures() == 0
    return records


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("__cudaLaunchKernel", CUDA_OUT_OF_MEMORY),
        ("cudaHostAlloc", CUDA_OUT_OF_MEMORY),
        ("cublasGemmEx", CUBLAS_ALLOC_FAILED),
    ],
)
def test_step_is_repeated_whatever_call_fails(card, dataset, tmp_path, function, error):
    config = cuda_config(tmp_path)
    records = train_with_failure_in_step_3(card, function, error, config, dataset, tmp_path / "run")
    assert steps_of(records) == [(1, 32), (2, 32), (3, 16), (4, 16)]


def test_compiled_step_is_repeated_when_a_kernel_fails(card, dataset, tmp_path):
    config = cuda_config(tmp_path, training__compile=True, model__n_layer=1)
    records = train_with_failure_in_step_3(
        card, "cuLaunchKernel", CUDA_OUT_OF_MEMORY, config, dataset, tmp_path / "run"
    )
    assert steps_of(records) == [(1, 32), (2, 32), (3, 16), (4, 16)]


@pytest.mark.parametrize(
    "query",
    ["nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2", "nvmlDeviceGetComputeRunningProcesses"],
)
def test_out_of_memory_is_recognized_when_nvml_fails(card, dataset, tmp_path, query):
    """torch asks NVML who else uses the card, for the text of the error."""
    config = cuda_config(tmp_path)
    card.limit_memory(limit_for(config, dataset, 16))
    card.fail_once(query, NVML_ERROR_UNKNOWN)
    assert steps_of(train(config, dataset, tmp_path / "run"))[-1] == (4, 16)
