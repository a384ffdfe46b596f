"""Find the model that a command names, and what is known about it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.runtime.environment import use_running_service
from gpt.config.loading import build_config, merge_overrides, read_toml
from gpt.config.schema import RunConfig
from gpt.data.continued import find_dataset_by_fingerprint
from gpt.errors import CheckpointError, ConfigError, Problem
from gpt.evaluation.report_store import REPORT_FILE, read_report_file
from gpt.exchange.model_card import ModelCardData
from gpt.model.section import CONFIG_FILE, MODEL_FILE, load_model_section
from gpt.training.checkpoint.retention import latest_checkpoint, read_progress
from gpt.training.run_dir import find_run_dir_by_name


def find_model(name: str, root: Path) -> Path:
    """Return the folder of a model.

    `name` is a registered model (`models:/...`), a folder with a `model.safetensors`, or the folder
    or name (below `root`) of a run, whose latest checkpoint is meant.

    Raises `RegistryError`, `ConfigError` if there is no such run, `CheckpointError` if the run has
    no checkpoint yet.
    """
    if name.startswith("models:"):
        use_running_service(root)
        from tasks.tracking.metadata import default_tracking_uri
        from tasks.tracking.model_lookup import fetch_model

        return fetch_model(name, default_tracking_uri(root), root)
    if (Path(name) / MODEL_FILE).is_file():
        return Path(name)
    run = find_run_dir_by_name(name, root)
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        rule, remedy = "the run has no complete checkpoint yet", "let it train for longer"
        raise CheckpointError(Problem(str(run), "", rule, remedy))
    return checkpoint.folder


def read_model_facts(model: Path) -> ModelCardData:
    """Read what a checkpoint's or registered model's folder says about it: config, progress,
    report, and its dataset if that still exists."""
    try:
        config = RunConfig.model_validate_json((model / CONFIG_FILE).read_bytes())
        progress = read_progress(model)
    except (OSError, ValidationError, CheckpointError):
        return ModelCardData(name=model.resolve().name)  # imported: without a run
    run = model.resolve().parent.parent
    reports = (read_report_file(folder / REPORT_FILE) for folder in (run, model))
    return ModelCardData(
        name=config.run.name,
        config=config,
        dataset=find_dataset_by_fingerprint(
            (run.parent.parent, config.run.root), progress.dataset_fingerprint
        ),
        tokens_seen=progress.tokens_seen,
        step=progress.step,
        report=next((r for r in reports if r and r.step == progress.step), None),
    )


def evaluation_config(
    model: Path, facts: ModelCardData, config: str | None, overrides: Mapping[str, Any]
) -> RunConfig:
    """Return the config to evaluate a model with: `config` if given, else its own run's, with the
    overrides and the model's own [model] section.

    Raises `ConfigError` for a model without a run if no config is given.
    """
    if config is not None:
        raw = read_toml(Path(config))
    elif facts.config:
        raw = facts.config.model_dump(mode="json")
    else:
        rule = "has no run, so the data to evaluate it on is unknown"
        remedy = "pass --config CONFIG; its [data] and [evaluation] are used"
        raise ConfigError(Problem("MODEL", str(model), rule, remedy))
    section = {"model": load_model_section(model).model_dump(mode="json")}
    return build_config(merge_overrides(merge_overrides(raw, overrides), section))
