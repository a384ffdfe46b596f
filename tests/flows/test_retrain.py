"""Retraining, with real Parquet, real shards, real training and a real MLflow store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import polars
import pytest
from corpus_data import decode_documents
from overnight_command import overnight

from flows.pretrain import pretrain
from flows.retrain import RetrainResult, retrain
from gpt.artifacts import DatasetManifest
from gpt.data.shards import read_manifest
from gpt.data.tokenize import pipeline
from gpt.data.tokenize.tokenizer import load_tokenizer
from gpt.errors import ConfigError, CorpusError, RegistryError
from gpt.evaluation.significance import compare_with_champion
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.step import TrainState
from tasks import evaluate
from tasks.tracking import registry
from tasks.tracking.mlflow_api import MlflowClient

pytestmark = pytest.mark.slow

LENGTH = 500
"""Characters of a document: the slices are to be small and of many documents."""
TEXTS = [
    text[start : start + LENGTH]
    for text in (topics[name] for name in sorted(topics))
    for start in range(0, min(len(text), 5 * LENGTH), LENGTH)
]
FIRST, SECOND = TEXTS[:60], TEXTS[60:90]

PIPELINE = (Path(__file__).parents[1] / "helpers" / "pipeline.toml").read_text()
CONFIG = f"""
{PIPELINE.partition("[evaluation]")[0]}
[evaluation]
interval = 100
tokens = 1_000_000
prompts = []
"""


class Nights:
    """A source, a root, and the same retraining night after night."""

    def __init__(self, folder: Path, mlflow_database: Path) -> None:
        self.root, self.source, self.path = folder / "runs", folder / "in", folder / "tiny.toml"
        (self.root / "mlflow").mkdir(parents=True)
        self.source.mkdir()
        shutil.copy(mlflow_database, self.root / "mlflow")
        self.path.write_text(CONFIG.format(root=self.root, source=self.source))
        self.mlflow = MlflowClient(f"sqlite:///{self.root}/mlflow/mlflow.db")

    def arrives(self, name: str, texts: list[str], folder: Path | None = None) -> Path:
        path = (folder or self.source) / name
        polars.DataFrame({"text": texts}).write_parquet(path)
        return path

    def night(self, start: Any = "scratch", path: object = None, **sections: Any) -> RetrainResult:
        named = None if path is None else str(path)
        return retrain.fn(str(self.path), sections, named, start)

    @property
    def aliases(self) -> dict[str, int]:
        aliases = self.mlflow.get_registered_model("gpt").aliases
        return {alias: int(version) for alias, version in aliases.items()}

    def dataset(self, done: RetrainResult) -> DatasetManifest:
        """Return the dataset that the challenger was trained on."""
        run = self.mlflow.get_run(done.outcome.mlflow_run_id)
        name = run.data.params["dataset.fingerprint"][:16]
        [folder] = self.root.glob(f"*/{name}")
        return read_manifest(folder)


@pytest.fixture
def nights(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Nights:
    """Models are registered without the files that only serving needs."""

    def write(folder: Path, *_: object) -> None:
        folder.mkdir()
        (folder / "MLmodel").write_text("flavors: {}\n")

    monkeypatch.setattr(registry, "write_pyfunc_model", write)
    return Nights(tmp_path, mlflow_database)


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are tokenized."""
    names: list[str] = []
    chunks = pipeline.read_chunks

    def record_name(source: Any, *rest: Any) -> Any:
        names.append(Path(source.file.name).name)
        return chunks(source, *rest)

    monkeypatch.setattr(pipeline, "read_chunks", record_name)
    return names


def test_unchanged_then_new_file_loses_then_wins(nights: Nights, tokenized: list[str]) -> None:
    nights.arrives("a.parquet", FIRST)
    first = nights.night()
    assert "no champion yet" in first.reason
    assert nights.aliases == {"champion": 1}
    unchanged = nights.night()
    assert unchanged.outcome is None
    assert "unchanged: gpt version 1 was trained on every file" in unchanged.reason
    (nights.source / "a.parquet").rename(nights.source / "z.parquet")
    assert "unchanged" in nights.night().reason, "another name is nothing new"

    # The new file repeats held-out documents and trained ones.
    before = nights.dataset(first)
    kept_out = decode_documents(before, before.validation)
    assert len(kept_out) > 5
    nights.arrives("b.parquet", SECOND + kept_out + decode_documents(before, before.train)[:5])
    tokenized.clear()
    lost = nights.night(training={"max_steps": 1})
    assert lost.reason.endswith("b.parquet")
    assert set(tokenized) == {"b.parquet"}
    now = nights.dataset(lost)
    assert lost.reused_tokens == before.train.tokens + before.validation.tokens
    assert lost.tokenized_tokens + lost.reused_tokens == now.train.tokens + now.validation.tokens
    assert not set(kept_out) & set(decode_documents(now, now.train))
    assert set(kept_out) < set(decode_documents(now, now.validation))

    slices = lost.slices
    for pair in (slices.current, slices.old, slices.new):
        assert pair.challenger.slice_fingerprint == pair.champion.slice_fingerprint
        assert len(pair.challenger.sequence_losses) > 10
    assert slices.current.challenger == lost.outcome.report
    assert slices.old.champion.slice_fingerprint == first.outcome.report.slice_fingerprint
    assert slices.old.champion.loss == pytest.approx(first.outcome.report.loss)
    pairs = (slices.current, slices.old, slices.new)
    assert len({pair.champion.slice_fingerprint for pair in pairs}) == 3
    verdict = compare_with_champion(slices.current.challenger, slices.current.champion)
    assert (lost.outcome.registered.reason, verdict.promoted) == (verdict.reason, False)
    assert "worse: loss" in verdict.reason
    assert nights.aliases == {"champion": 1, "challenger": 2}
    metrics = nights.mlflow.get_run(lost.outcome.mlflow_run_id).data.metrics
    assert metrics["final/loss"] == pytest.approx(slices.current.challenger.loss)
    assert metrics["champion/loss"] == pytest.approx(slices.current.champion.loss)
    assert metrics["final/old_text_loss"] == pytest.approx(slices.old.challenger.loss)
    assert metrics["champion/old_text_loss"] == pytest.approx(slices.old.champion.loss)
    lines = dict(lost.lines)
    assert "forgotten some" in lines["old slice"]
    assert "gpt version 2, challenger: worse" in lines["verdict"]

    again = nights.night(training={"max_steps": 1})
    assert again.outcome is None
    assert "already tried: gpt version 2" in again.reason
    assert verdict.reason in again.reason

    tokenized.clear()
    won = nights.night(training={"max_steps": 60})
    assert not tokenized
    assert "better: loss" in won.outcome.registered.reason
    assert nights.aliases == {"champion": 3, "previous-champion": 1, "challenger": 2}
    assert "unchanged: gpt version 3" in nights.night(training={"max_steps": 60}).reason
    (nights.source / "b.parquet").unlink()
    gone = nights.night()
    assert gone.outcome is None
    assert "1 of its files were removed" in gone.reason
    # As a command, which does not start Prefect's API for this.
    done = overnight("retrain", nights.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to do" in done.stdout
    assert "unchanged: gpt version 3" in done.stdout
    assert not list(nights.root.glob("prefect/*.db"))


def fails_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    take: Callable[[Any], Any] = TrainState.micro_batches

    def fails(self: TrainState) -> Any:
        if self.step == step:
            raise RuntimeError("the machine went away")
        return take(self)

    monkeypatch.setattr(TrainState, "micro_batches", fails)


def fails_once(monkeypatch: pytest.MonkeyPatch, call: int) -> list[Any]:
    """Return the evaluations, of which one fails."""
    asked: list[Any] = []
    really = evaluate.evaluate_saved_model

    def evaluated(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == call:
            raise RuntimeError("the machine went away")
        return really(*arguments)

    monkeypatch.setattr(evaluate, "evaluate_saved_model", evaluated)
    return asked


def test_continue_from_champion_interrupted_and_resumed(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.arrives("a.parquet", FIRST)
    first = nights.night()
    elsewhere = nights.root.parent / "elsewhere"
    elsewhere.mkdir()
    path = nights.arrives("b.parquet", SECOND, elsewhere)
    warm = {"schedule": {"warmup_steps": 3}}
    with monkeypatch.context() as patch:
        fails_at(patch, 20)
        with pytest.raises(RuntimeError, match="went away"):
            nights.night("champion", path, **warm)
    done = nights.night("champion", path, **warm)

    assert len(list(nights.root.glob("train/tiny-*"))) == 2, "the same run resumed"
    before, made = nights.dataset(first), nights.dataset(done)
    trained_on = decode_documents(made, made.train)
    known = set(decode_documents(before, before.train))
    replayed = [text for text in trained_on if text in known]
    new = [text for text in trained_on if text not in known]
    assert set(new) == set(SECOND) - set(decode_documents(made, made.validation))
    assert replayed
    share = sum(map(tokens, replayed)) / made.train.tokens
    assert share == pytest.approx(0.05, abs=0.03), "but for whole documents"
    assert made.train.text_bytes == sum(len(text.encode()) for text in trained_on)
    assert set(decode_documents(before, before.validation)) <= set(
        decode_documents(made, made.validation)
    )
    assert done.slices.old
    params = nights.mlflow.get_run(done.outcome.mlflow_run_id).data.params
    steps = made.train.tokens // 128
    assert (params["training.max_steps"], done.outcome.report.step) == (str(steps), steps)
    assert params["schedule.warmup_steps"] == str(-(-steps * 3 // 12))
    assert Path(params["training.init_from"], "model.safetensors").is_file()
    rates = nights.mlflow.get_metric_history(done.outcome.mlflow_run_id, "lr")
    assert [point.step for point in rates] == list(range(1, steps + 1))
    assert rates[0].value < max(point.value for point in rates) > rates[-1].value
    losses = nights.mlflow.get_metric_history(done.outcome.mlflow_run_id, "train/loss")
    assert losses[0].value < 10.8 < 10.9, "not from random weights"
    assert "gpt version 1" in dict(done.lines)["challenger"]
    assert "better: loss" in done.outcome.registered.reason
    again = nights.night("champion", path, **warm)
    assert again.outcome is None
    assert "unchanged: gpt version 2" in again.reason
    # A continued champion knows all text that it and its predecessors were trained on.
    third = TEXTS[90:120]
    nights.arrives("c.parquet", third)
    few: dict[str, Any] = {"training": {"max_steps": 5}}
    with monkeypatch.context() as patch:
        evaluated = fails_once(patch, 4)
        with pytest.raises(RuntimeError, match="went away"):
            nights.night("champion", path, **few)
        last = nights.night("champion", path, **few)
    assert len(evaluated) == 6 + 1, "no report is made twice"
    assert last.reason.endswith(f"new to gpt version 2: {nights.source}/c.parquet")
    assert last.outcome.report.step == 5, "at most the override"
    made = nights.dataset(last)
    trained_on = decode_documents(made, made.train)
    new = [text for text in trained_on if text in third]
    assert set(new) == set(third) - set(decode_documents(made, made.validation))
    assert 0 < len(trained_on) - len(new) < len(new) / 5
    assert last.slices.old


def tokens(text: str) -> int:
    return 1 + len(load_tokenizer().encode_ordinary(text))


def test_run_is_compared_with_champion_later(nights: Nights) -> None:
    nights.arrives("a.parquet", FIRST)
    nights.night()
    nights.arrives("b.parquet", SECOND)
    by_hand = pretrain.fn(str(nights.path), {"training": {"max_steps": 40}})
    assert "evaluated on other text" in by_hand.registered.reason
    done = nights.night(training={"max_steps": 40})
    assert done.outcome.folder == by_hand.folder
    assert done.outcome.registered.version == by_hand.registered.version
    assert "better: loss" in done.outcome.registered.reason
    assert nights.aliases["champion"] == int(by_hand.registered.version)


def test_refuses_invalid_start_and_leaking_validation_text(nights: Nights) -> None:
    nights.arrives("a.parquet", FIRST)
    nights.night(training={"max_steps": 1})
    runs = len(list(nights.root.glob("train/*")))
    with pytest.raises(ConfigError, match=r"validation_fraction = 0\.1\n.*would be trained on"):
        nights.night(data={"validation_fraction": 0.1})
    with pytest.raises(CorpusError, match=r"path = .*none\.parquet\n.*no such file"):
        nights.night(path=nights.root / "none.parquet")
    with pytest.raises(CorpusError, match=r"tiny\.toml\n.*not Parquet"):
        nights.night(path=nights.path)
    nights.arrives("b.parquet", SECOND)
    with pytest.raises(
        ConfigError, match=r"cannot be used as initial weights.*another shape: n_embd 16"
    ):
        nights.night("champion", model={"n_embd": 32})
    with pytest.raises(ConfigError, match="registered_model"):
        nights.night(tracking={"registered_model": ""})
    nights.mlflow.delete_registered_model_alias("gpt", "champion")
    with pytest.raises(RegistryError, match="has the alias champion"):
        nights.night()
    assert len(list(nights.root.glob("train/*"))) == runs, "no run was started"


def test_lost_dataset_is_noted_and_new_settings_are_a_change(nights: Nights) -> None:
    nights.arrives("a.parquet", FIRST)
    first = nights.night(training={"max_steps": 1})
    shutil.rmtree(nights.root / "datasets")
    assert "unchanged" in nights.night().reason, "MLflow has the manifest"
    more = nights.night(training={"max_steps": 1}, data={"validation_fraction": 0.3})
    assert "data.validation_fraction is 0.3 and was 0.2" in more.reason
    assert len(more.notes) == 2
    assert "is missing" in more.notes[0]
    assert "too low" in more.notes[1]
    assert (more.slices.old, more.slices.new) == (None, None)
    artifacts = nights.mlflow.get_run(first.outcome.mlflow_run_id).info.artifact_uri
    shutil.rmtree(Path(artifacts.removeprefix("file://")) / "dataset")
    shutil.rmtree(nights.root / "datasets")
    lost = nights.night(training={"max_steps": 2})
    assert "is unknown, so all files count as new" in lost.reason
    assert lost.outcome.registered.version == "3"
    assert latest_checkpoint(lost.outcome.folder).step == 2
