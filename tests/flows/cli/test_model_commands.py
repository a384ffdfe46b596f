"""`overnight generate`, `export` and `import-hf`, on a run that was trained here."""

from __future__ import annotations

from pathlib import Path

import polars
import pytest
from overnight_command import overnight as in_a_process
from training_data import make_token_dataset, small_config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flows.cli.main import app
from flows.cli.model_choice import evaluation_config, read_model_facts
from gpt.artifacts import EvaluationReport
from gpt.errors import CheckpointError, ConfigError, ExchangeError, GenerationError
from gpt.evaluation.heldout import evaluate_heldout
from gpt.evaluation.progress import run_to_completion
from gpt.evaluation.report_store import save_report
from gpt.hardware.device import pick_device
from gpt.model.io import load_model
from gpt.preflight.checks import check_init_from
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.loop import train
from gpt.training.run_dir import open_run_dir, run_identity


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("root")
    dataset = make_token_dataset(root / "datasets" / "0123")
    config = small_config(root)
    folder = open_run_dir(config, dataset)
    list(train(config, dataset, folder))
    report = EvaluationReport(
        step=20, tokens=64, loss=9.5, perplexity=13_000.0, bits_per_byte=3.0, samples=()
    )
    save_report(folder, config, report)
    return folder


def overnight(*arguments: object) -> str:
    """Return what the command prints; raise what it raises."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception:
        raise result.exception
    return result.output


def test_generate_finds_model_by_run_name_folder_and_checkpoint(run_folder):
    root = run_folder.parent.parent
    settings = ("The", "--max-tokens", 9, "--seed", 3)
    done = in_a_process("generate", "--model", "t", *map(str, settings), "--root", root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("The")
    assert len(done.stdout) > 12
    assert overnight("generate", "--model", run_folder, *settings) == done.stdout
    checkpoint = latest_checkpoint(run_folder).folder
    assert overnight("generate", "--model", checkpoint, *settings) == done.stdout
    assert overnight("generate", "--model", run_folder, *settings[:-1], 4) != done.stdout


def test_export_import_export_round_trip(run_folder, tmp_path):
    assert "license" in overnight("export", run_folder, tmp_path / "hf")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config
    assert (config.n_embd, config.n_layer, config.n_positions) == (16, 2, 8)
    card = (tmp_path / "hf" / "README.md").read_text()
    for part in ("# t\n", "| tokens seen | 1,280 |", "| steps | 20 |", "9.5000", "`up.parquet`"):
        assert part in card
    assert "width 16" in overnight("import-hf", tmp_path / "hf", tmp_path / "back")
    greedy = ("The", "--max-tokens", 9, "--temperature", 0)
    written = overnight("generate", "--model", run_folder, *greedy)
    assert overnight("generate", "--model", tmp_path / "back", *greedy) == written
    overnight("export", tmp_path / "back", tmp_path / "again")
    first, again = (tmp_path / name / "model.safetensors" for name in ("hf", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_evaluate_run_and_imported_model(run_folder, tmp_path):
    root = run_folder.parent.parent
    benchmark = str(tmp_path / "lambada.parquet")
    polars.DataFrame({"text": ["the dog ran home", "a man saw a man"]}).write_parquet(benchmark)
    asked = ("--set", f"evaluation.lambada={benchmark}", "--set", 'evaluation.prompts=["The"]')
    done = in_a_process("evaluate", "t", *asked, "--json", "--root", root)
    assert (done.returncode, done.stderr) == (0, "")
    report = EvaluationReport.model_validate_json(done.stdout)
    assert (report.step, report.tokens) == (20, 64)
    assert report.lambada
    assert report.lambada.examples == 2
    assert len(report.samples) == 1

    overnight("export", run_folder, tmp_path / "hf")
    overnight("import-hf", tmp_path / "hf", tmp_path / "back")
    with pytest.raises(ConfigError, match="--config CONFIG"):
        evaluation_config(tmp_path / "back", read_model_facts(tmp_path / "back"), None, {})
    config = tmp_path / "c.toml"
    config.write_text(
        '[run]\nname = "c"\n[data]\nsource = "x"\n[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\n'
        "block_size = 4\n[training]\nbatch_size = 1\ngrad_acc = 1\nmax_steps = 1\n"
        "[evaluation]\ntokens = 64\n"
    )
    again = evaluation_config(
        tmp_path / "back", read_model_facts(tmp_path / "back"), str(config), {}
    )
    assert (again.model.n_embd, again.evaluation.tokens) == (16, 64)
    model, dataset = (
        load_model(tmp_path / "back", pick_device("cpu")),
        read_model_facts(latest_checkpoint(run_folder).folder).dataset,
    )
    assert run_to_completion(evaluate_heldout(model, again, dataset)).loss == pytest.approx(
        report.loss, 1e-5
    )


def test_training_starts_from_a_model_s_weights(run_folder, tmp_path):
    dataset = make_token_dataset(tmp_path / "datasets" / "0123")
    source = latest_checkpoint(run_folder).folder
    config = small_config(tmp_path, training__init_from=str(source))
    first = next(iter(train(config, dataset, tmp_path / "further")))
    fresh = next(iter(train(small_config(tmp_path), dataset, tmp_path / "fresh")))
    assert first.validation.loss < fresh.validation.loss - 0.5
    assert run_identity(config, "x") != run_identity(small_config(tmp_path), "x")
    wider = small_config(tmp_path, training__init_from=str(source), model__n_embd=32)
    problem = check_init_from(wider)
    assert "n_embd 16, not 32 as in [model]" in problem.rule
    assert "--set model.n_embd=16" in problem.remedy
    assert check_init_from(config) is None
    missing = small_config(tmp_path, training__init_from=str(tmp_path))
    assert "no model.safetensors" in check_init_from(missing).rule


def test_model_commands_report_user_errors(run_folder, tmp_path):
    with pytest.raises(ConfigError, match="neither a run folder nor the name of a run"):
        overnight("generate", "--model", "no-such-run", "The", "--root", tmp_path)
    with pytest.raises(GenerationError, match="2 problems"):
        overnight("generate", "--model", run_folder, "The", "--top-p", 2, "--temperature", -1)
    with pytest.raises(ConfigError, match=r"hardware.device = cuda:99"):
        overnight("generate", "--model", run_folder, "The", "--device", "cuda:99")
    with pytest.raises(ExchangeError, match="already exists"):
        overnight("export", run_folder, run_folder)
    with pytest.raises(ExchangeError, match="cannot be read"):
        overnight("import-hf", tmp_path, tmp_path / "x")
    empty = small_config(tmp_path, training__seed=2)
    folder = open_run_dir(empty, make_token_dataset(tmp_path / "datasets" / "0123"))
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        overnight("generate", "--model", folder, "The")
