"""The preflight's report: figures, every check, suggestions that help, and never a traceback."""

from __future__ import annotations

import json
import random
import socket
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gpt.config.loading import merge_overrides, read_toml
from gpt.errors import ConfigError
from gpt.hardware import target_gpu
from gpt.hardware.gpus import GIB, find_gpu
from gpt.hardware.target_gpu import TargetGPU, find_target_gpu
from gpt.preflight.render import render_markdown
from gpt.preflight.report import Report, run_preflight, run_preflight_on_values
from gpt.preflight.suggestions import apply_overrides

ROOT = Path(__file__).resolve().parents[3]
GOOD = ROOT / "configs" / "gpt-576.toml"
BASE = read_toml(ROOT / "configs" / "gpt-768.toml")
BASE["optimizer"] = {}
BASE["model"]["architecture"] = "gpt2"


def make_report(
    overrides: Mapping[str, Any], gpu: str = "rtx-4070", starting: bool = False
) -> Report:
    return run_preflight_on_values(
        "x.toml", apply_overrides(BASE, overrides), find_target_gpu(gpu), starting
    )


def keys(problems: tuple[Any, ...]) -> set[str]:
    return {problem.key for problem in problems}


# --- figures -------------------------------------------------------------------------------------


def test_json_holds_the_documented_figures() -> None:
    values = json.loads(json.dumps(make_report({}).as_json()))
    assert values["parameters"]["total"] == 124_373_760
    assert sum(values["memory"]["parts"].values()) == values["memory"]["peak_bytes"]
    assert values["tokens_per_step"] == 16 * 32 * 1024
    assert values["flops_per_token"] == 854_654_976
    low, high = values["hours_range"]
    assert 7 < low < values["hours"] < high < 11
    assert not values["blocked"]
    assert values["problems"] == values["suggestions"] == []
    assert {"key", "value", "rule", "remedy"} == values["warnings"][0].keys()


def test_flops_equal_nanogpts_estimate() -> None:
    """6 N + 12 L H Q T, N without positions (nanoGPT's estimate_mfu), minus the vectors."""
    figures = make_report({}).figures
    assert figures is not None
    model, vectors = figures.config.model, figures.parameters.vectors
    n = 124_373_760 - model.block_size * model.n_embd - vectors
    assert figures.config.flops_per_token == 6 * n + 12 * 12 * 12 * 64 * 1024


def test_unknown_gpu_gives_no_number() -> None:
    report = make_report({}, gpu="rtx-4700")
    values = report.as_json()
    assert (values["hours"], values["tokens_per_second"], values["memory"]["fits"]) == (None,) * 3
    warning = next(warning for warning in report.warnings if warning.key == "--gpu")
    assert "rtx-4070" in warning.remedy
    assert "n/a" in render_markdown(report)


def test_gpu_without_bfloat16_uses_float16() -> None:
    report = make_report({}, gpu="t4")
    assert any("float16" in warning.rule for warning in report.warnings)
    assert report.figures is not None
    assert "65 TFLOP/s" in report.figures.throughput.basis


def write_run(root: Path, name: str, rate: float, steps: int) -> None:
    """Leave the files of a finished run of the base config on an RTX 4070."""
    folder = root / "train" / name
    folder.mkdir(parents=True)
    figures = make_report({"run.root": str(root)}).figures
    assert figures is not None
    record = {"config": figures.config.model_dump(mode="json")}
    (folder / "run.json").write_text(json.dumps(record))
    pending = {"parameters": {"device": "cuda: NVIDIA GeForce RTX 4070"}}
    (folder / "tracking_outbox.json").write_text(json.dumps(pending))
    line = json.dumps({"step": 1, "time_ms": 0, "metrics": {"tokens_per_second": rate}})
    (folder / "metrics.jsonl").write_text(f"{line}\n" * steps)


def test_throughput_is_corrected_by_earlier_runs_on_this_gpu(tmp_path: Path) -> None:
    overrides = {"run.root": str(tmp_path)}
    before = make_report(overrides).figures
    assert before is not None
    write_run(tmp_path, "old-1", 60_000.0, steps=1000)
    now = make_report(overrides).figures
    assert now is not None
    assert now.throughput.tokens_per_second == pytest.approx(60_000, rel=0.02)
    assert now.throughput.slowest < 60_000 < now.throughput.fastest
    assert "measured on this card by old-1" in now.throughput.basis
    other = make_report(overrides, gpu="rtx-4070-ti").figures
    assert other is not None
    assert "published runs on other GPUs" in other.throughput.basis


# --- checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"model.n_embd": 770}, "model.n_embd"),
        ({"model.architecture": "nanochat", "model.n_embd": 36}, "model.n_head"),
        ({"schedule.warmup_steps": 4000}, "schedule.warmup_steps"),
        ({"schedule.min_learning_rate_ratio": 2.0}, "schedule.min_learning_rate_ratio"),
        ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate"),
        ({"model.dropout": 1.0}, "model.dropout"),
        ({"model.vocab_size": 70_000}, "model.vocab_size"),
        ({"model.vocab_size": 50_000}, "model.vocab_size"),
        ({"training.dtype": "int8"}, "training.dtype"),
        ({"hardware.device": "gpu"}, "hardware.device"),
        ({"training.batch_size": 64}, "training.batch_size"),
        ({"run.root": str(GOOD / "runs")}, "run.root"),
        ({"training.checkpoints_kept": 10**9}, "run.root"),
    ],
)
def test_impossible_setting_blocks(overrides: dict[str, Any], key: str) -> None:
    report = make_report(overrides)
    assert report.blocked
    assert key in keys(report.problems)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"model.n_embd": 720}, "model.n_head"),
        ({"model.vocab_size": 50_257}, "model.vocab_size"),
        ({"training.grad_acc": 1}, "training.grad_acc"),
        ({"optimizer.head_learning_rate": 1e-3}, "optimizer.head_learning_rate"),
        (
            {"optimizer.name": "muon", "optimizer.head_learning_rate": 1.0},
            "optimizer.learning_rate",
        ),
        ({"model.architecture": "nanochat", "model.bias": True}, "model.bias"),
        ({"data.source": "no/such/*.parquet"}, "data.source"),
        ({"tracking.uri": "http://127.0.0.1:1"}, "tracking.uri"),
        ({"tracking.uri": "http://[broken"}, "tracking.uri"),
    ],
)
def test_costly_or_useless_setting_is_a_warning(overrides: dict[str, Any], key: str) -> None:
    report = make_report(overrides)
    assert not report.blocked
    assert key in keys(report.warnings)


def test_missing_data_blocks_a_starting_run_and_warns_otherwise() -> None:
    assert keys(make_report({}).warnings) == {"data.source"}
    assert "data.source" in keys(make_report({}, starting=True).problems)


def test_reachable_tracking_server_gives_no_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "tracking.uri" not in keys(make_report({"tracking.uri": uri}).warnings)


def test_missing_device_blocks_unless_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_gpu, "installed_gpus", lambda: ())
    overrides = {"hardware.device": "cuda:1"}
    assert "hardware.device" in keys(make_report(overrides, gpu="auto").problems)
    assert "hardware.device" not in keys(make_report(overrides, gpu="rtx-4070").problems)


def test_installed_gpu_is_known_by_name_and_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    here = (target_gpu.InstalledGPU("NVIDIA GeForce RTX 4070", 12 * GIB, 2 * GIB),)
    monkeypatch.setattr(target_gpu, "installed_gpus", lambda: here)
    report = make_report({}, gpu="auto")
    assert report.gpu.spec is find_gpu("rtx-4070")
    assert any("other processes" in warning.rule for warning in report.warnings)


def test_starting_run_that_is_too_large_gets_a_warning_only() -> None:
    report = run_preflight_on_values(
        "x.toml",
        apply_overrides(BASE, {"training.batch_size": 64, "data.source": str(GOOD)}),
        find_target_gpu("rtx-4070"),
        starting=True,
    )
    assert "training.batch_size" not in {
        problem.key for problem in report.problems if "needs" in problem.rule
    }
    assert any("halved" in warning.rule for warning in report.warnings)


# --- data ----------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """A source of 4,000,000 bytes without a dataset."""
    (tmp_path / "text.parquet").write_bytes(b"0" * 4_000_000)
    return {"data.source": str(tmp_path / "*.parquet"), "run.root": str(tmp_path / "runs")}


def test_tokens_are_estimated_from_file_sizes(data: dict[str, Any]) -> None:
    report = make_report(data)
    assert report.figures is not None
    assert report.figures.data.train_tokens == 1_980_000
    assert "estimated" in report.figures.data.basis
    assert report.figures.disk["shards"] == 4_000_000
    assert {"training.max_steps", "evaluation.tokens"} <= keys(report.warnings)


def test_tokens_are_those_of_an_existing_dataset(data: dict[str, Any]) -> None:
    write_manifest(data, train=3_000_000, validation=2_000_000)
    report = make_report(data)
    assert report.figures is not None
    assert report.figures.data.train_tokens == 3_000_000
    assert report.figures.epochs == pytest.approx(1_703_936_000 / 3_000_000)
    assert report.figures.disk["shards"] == 0
    assert "evaluation.tokens" not in keys(report.warnings)


@pytest.mark.parametrize(
    ("tokens", "key"), [(1_000, "model.block_size"), (9_000, "training.batch_size")]
)
def test_data_smaller_than_a_batch_blocks(data: dict[str, Any], tokens: int, key: str) -> None:
    write_manifest(data, train=tokens, validation=tokens)
    assert key in keys(make_report(data).problems)


def test_manifest_of_other_files_or_broken_manifest_is_ignored(data: dict[str, Any]) -> None:
    write_manifest(data, train=1, validation=1, size_bytes=17)
    broken = Path(data["run.root"]) / "datasets" / "b" / "manifest.json"
    broken.parent.mkdir()
    broken.write_text("{")
    report = make_report(data)
    assert report.figures is not None
    assert "estimated" in report.figures.data.basis


def write_manifest(
    data: dict[str, Any], train: int, validation: int, size_bytes: int = 4_000_000
) -> None:
    folder = Path(data["run.root"]) / "datasets" / "a"
    folder.mkdir(parents=True)
    manifest = {
        "sources": [{"path": "text.parquet", "size_bytes": size_bytes}],
        "text_column": "text",
        "validation_fraction": 0.01,
        "train": {"tokens": train},
        "validation": {"tokens": validation},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


# --- suggestions ---------------------------------------------------------------------------------


def test_head_splits_are_ranked_by_parameters() -> None:
    report = make_report({"model.n_embd": 512})
    pairs = [(choice.n_embd, choice.n_head) for choice in report.suggestions]
    assert set(pairs) == {(512, 8), (512, 16), (480, 12), (576, 12)}
    wanted = 64_041_472
    distances = [abs((choice.parameters or 0) - wanted) for choice in report.suggestions]
    assert distances == sorted(distances)
    assert all(choice.fits for choice in report.suggestions)


def test_memory_savings_keep_tokens_per_step() -> None:
    report = make_report({"training.batch_size": 64})
    first = report.suggestions[0].overrides
    assert first["training.batch_size"] * first["training.grad_acc"] == 64 * 32


GPU_NAMES = ("rtx-4050-laptop", "rtx-3060", "rtx-4090", "t4")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    architecture=st.sampled_from(["gpt2", "nanochat"]),
    optimizer=st.sampled_from(["adamw", "muon"]),
    n_head=st.integers(1, 40),
    n_embd=st.integers(1, 2500),
    batch_size=st.sampled_from([1, 3, 16, 64, 300]),
    grad_acc=st.integers(1, 8),
    block_size=st.sampled_from([128, 1024, 4096]),
    gpu=st.sampled_from(GPU_NAMES),
)
def test_every_suggestion_removes_its_problem(
    architecture: str,
    optimizer: str,
    n_head: int,
    n_embd: int,
    batch_size: int,
    grad_acc: int,
    block_size: int,
    gpu: str,
) -> None:
    raw = apply_overrides(
        BASE,
        {
            "model.architecture": architecture,
            "model.n_head": n_head,
            "model.n_embd": n_embd,
            "model.block_size": block_size,
            "optimizer.name": optimizer,
            "training.batch_size": batch_size,
            "training.grad_acc": grad_acc,
        },
    )
    target = find_target_gpu(gpu)
    report = run_preflight_on_values("x.toml", raw, target)
    assume(report.suggestions)
    for choice in report.suggestions:
        after = run_preflight_on_values("x.toml", apply_overrides(raw, choice.overrides), target)
        assert choice.key not in keys(after.problems) or (
            # A head split may not fit into memory, which is another problem.
            choice.fits is False and after.figures is not None
        )
        if after.figures is not None:
            assert after.figures.fits == choice.fits
            assert after.figures.parameters.total == choice.parameters
        if choice.key in keys(report.warnings):
            assert choice.key not in keys(after.warnings)


def test_remedies_in_messages_work() -> None:
    """Follow the messages: the problem is gone."""
    wrong = {
        "schedule.warmup_steps": (4000, 325),
        "model.vocab_size": (50_257, 50_304),
        "training.grad_acc": (1, 32),
    }
    for key, (value, remedy) in wrong.items():
        before, after = make_report({key: value}), make_report({key: remedy})
        found = next(p for p in (*before.problems, *before.warnings) if p.key == key)
        assert str(remedy) in found.remedy
        assert key not in keys(after.problems) | keys(after.warnings)


# --- any input -----------------------------------------------------------------------------


def test_ten_thousand_random_configs_end_in_a_report(tmp_path: Path) -> None:
    chance = random.Random(4)
    nowhere = TargetGPU("RTX 4070", find_gpu("rtx-4070"), 12 * GIB, is_named=True)
    path, text = tmp_path / "any.toml", GOOD.read_text()
    path.write_text(text)
    raw = read_toml(path)
    ends = {"blocked": 0, "config error": 0, "good": 0}
    for number in range(10_000):
        try:
            if number % 4 == 0:
                path.write_bytes(mutate(text, chance))
                values = read_toml(path)
            else:
                values = merge_overrides(
                    raw, [random_override(chance) for _ in range(chance.randint(1, 4))]
                )
            report = run_preflight_on_values("any.toml", values, nowhere)
        except ConfigError:
            ends["config error"] += 1
            continue
        ends["blocked" if report.blocked else "good"] += 1
        json.dumps(report.as_json())
        if number % 20 == 0:
            render_markdown(report)
    assert min(ends.values()) > 100, ends


NASTY = (
    *('""', '"x"', "'\\u0000'", "true", "[]", "[1]", "{}", "{a = 1}", "nan", "inf", "-inf"),
    *("1e400", "0", "-1", "1", "7", "9" * 30, "9" * 5000, "0.5", "1.0", "1979-05-27"),
    *("1979-05-27T07:32:00Z", "[[[[1]]]]", '["a", "b"]', '"cuda:99"', '"http://"', '"\\ud800"'),
    *('"~nobody/x"', "0x10", "12", "64", "1024", "16", '"float16"', '"nanochat"', '"muon"', '"/"'),
    *("3", "1_000_000_000"),
)


def random_override(chance: random.Random) -> str:
    section = chance.choice([*BASE, "evaluation", "tracking", "hardware", "model", "nothing"])
    names = {
        "model": "architecture n_layer n_head n_embd block_size vocab_size dropout bias",
        "training": "batch_size grad_acc max_steps dtype compile loss_chunk_rows checkpoints_kept",
        "optimizer": "name learning_rate head_learning_rate weight_decay beta1",
        "data": "source text_column validation_fraction tokens_per_shard",
        "hardware": "device",
        "tracking": "uri experiment",
        "run": "name root",
    }
    name = chance.choice([*names.get(section, "interval").split(), "nothing"])
    key = chance.choice([f"{section}.{name}"] * 12 + [section, f"{section}.{name}.x", "", "a.b.c"])
    return f"{key}={chance.choice(NASTY)}"


def mutate(text: str, chance: random.Random) -> bytes:
    raw = bytearray(text.encode())
    for _ in range(chance.randint(0, 6)):
        place = chance.randrange(len(raw))
        match chance.randrange(4):
            case 0:
                raw[place] = chance.randrange(256)
            case 1:
                raw[place:place] = chance.choice(string.printable).encode()
            case 2:
                del raw[place : place + chance.randint(1, 12)]
            case _:
                raw[place:place] = f"\n[{chance.choice(list(BASE))}]\n".encode()
        raw = raw or bytearray(b" ")
    return bytes(raw)


def test_unreadable_file_ends_in_a_report(tmp_path: Path) -> None:
    assert run_preflight(str(tmp_path)).blocked
    assert run_preflight(str(tmp_path / "none.toml")).blocked
