"""The scripts in examples/ run as their readers run them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STEPS = 10
UNTRAINED_LOSS = 10.8
"""ln(50,304), nats."""


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One root for all examples, so that the text is tokenized once."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def trained_loss(parquet: Path, root: Path) -> float:
    """The loss that the training example returns."""
    return float(load_example("train").main(str(parquet), root, STEPS))


def test_training_example_learns_and_resumes(
    trained_loss: float, parquet: Path, root: Path
) -> None:
    assert trained_loss < UNTRAINED_LOSS - 0.5
    assert load_example("train").main(str(parquet), root, STEPS) == trained_loss


def test_architecture_example_trains_the_new_network(parquet: Path, root: Path) -> None:
    losses = load_example("add_architecture").main(str(parquet), root, STEPS)
    assert set(losses) == {"gpt2", "parallel-gpt2"}
    assert max(losses.values()) < UNTRAINED_LOSS - 0.5
    assert losses["gpt2"] != losses["parallel-gpt2"]


@pytest.mark.usefixtures("trained_loss")
def test_scoring_example_prefers_prose_to_noise(root: Path, tmp_path: Path) -> None:
    checkpoint = root / "train" / "example" / "checkpoints" / f"step-{STEPS:08d}"
    prose, noise = tmp_path / "prose.txt", tmp_path / "noise.txt"
    prose.write_text("The statement is executed if the expression is true. " * 20)
    noise.write_text("zq9 xkv 00-- vv7 jjq wzx " * 20)
    scores = load_example("score_text").main(checkpoint, [prose, noise])
    assert scores[prose] < scores[noise]
