"""The benchmark scripts run, and their points say which micro-batch was used."""

import sys
from pathlib import Path

import pytest
import torch
from training_data import make_token_dataset, small_config

from gpt.training import step
from gpt.training.metrics import StepRecord


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent / "benchmarks"), *sys.path])


@pytest.mark.parametrize(("recipe", "batch_size"), [("plain_points", 4), ("our_points", 2)])
def test_points_of_training_have_the_micro_batch_that_fitted(
    recipe, batch_size, tmp_path, monkeypatch
):
    import bench_training

    real = step.linear_cross_entropy

    def limited(hidden, *rest):  # a device on which two sequences fit
        if hidden.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(hidden, *rest)

    monkeypatch.setattr(step, "linear_cross_entropy", limited)
    dataset = make_token_dataset(tmp_path / "tokens")
    config = small_config(tmp_path, training__max_steps=4)
    points = list(getattr(bench_training, recipe)(config, dataset))
    assert [point["batch_size"] for point in points] == 4 * [batch_size]
    assert points[-1]["validation"] is not None


def test_safe_training_records_each_step(tmp_path):
    import bench_safety

    dataset = make_token_dataset(tmp_path / "tokens")
    config = small_config(tmp_path)
    with bench_safety.recorder_of("safe", config, dataset, tmp_path / "run") as record_step:
        record_step(StepRecord(step=1, tokens_seen=64, learning_rate=0.1, loss=7.0))
    assert (tmp_path / "run" / "metrics.jsonl").exists()
