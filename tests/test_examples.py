"""The scripts in examples/ run as their readers run them."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
UNIGRAM_LOSS = 8.5
"""A model that learned anything is below this; an untrained one is at ln(50,304) = 10.8."""


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_example_learns_and_resumes(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load_example("train")
    loss = example.main(str(parquet), tmp_path, steps=40)
    assert loss < UNIGRAM_LOSS
    assert "bits per byte" in capsys.readouterr().out
    assert example.main(str(parquet), tmp_path, steps=40) == loss  # nothing left to train


def test_architecture_example_trains_the_new_network(parquet: Path, tmp_path: Path) -> None:
    losses = load_example("add_architecture").main(str(parquet), tmp_path, steps=40)
    assert set(losses) == {"gpt2", "parallel-gpt2"}
    assert max(losses.values()) < UNIGRAM_LOSS
    assert losses["gpt2"] != losses["parallel-gpt2"]


def test_scoring_example_finds_prose_likelier_than_noise(parquet: Path, tmp_path: Path) -> None:
    load_example("train").main(str(parquet), tmp_path, steps=40)
    folder = next((tmp_path / "train" / "example" / "checkpoints").glob("step-*"))
    prose, noise = tmp_path / "prose.txt", tmp_path / "noise.txt"
    prose.write_text("The statement is executed if the expression is true. " * 20)
    noise.write_text("zq9 xkv 00-- vv7 jjq wzx " * 20)
    scores = load_example("score_text").main(str(folder), [str(prose), str(noise)])
    assert all(math.isfinite(score) for score in scores.values())
    assert scores[str(prose)] < scores[str(noise)]
