"""Which model a person means, and what is known of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flows.runtime.environment import use_running_service
from gpt.artifacts import DatasetManifest, EvaluationReport
from gpt.config.loading import build_config, merge_overrides, read_toml
from gpt.config.schema import RunConfig
from gpt.data.continued import DERIVED_DATASETS
from gpt.data.shards import MANIFEST, read_manifest
from gpt.errors import CheckpointError, ConfigError, DatasetError, Problem
from gpt.evaluation.report_store import REPORT_FILE, read_report_file
from gpt.exchange.model_card import ModelCardData
from gpt.model.section import CONFIG_FILE, MODEL_FILE, load_model_section
from gpt.training.checkpoint.retention import latest_checkpoint, read_progress
from gpt.training.run_dir import find_run_dir_by_name


def find_model(name: str, root: Path) -> Path:
    """The folder of a model: for `models:/...` what MLflow's registry has under that name, else
    `name` itself where a `model.safetensors` lies in it, else the newest checkpoint of the run that
    `name` is the folder or, below `root`, the name of. Raises `RegistryError`, `ConfigError` where
    there is no such run, `CheckpointError` where it has no checkpoint yet."""
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
    """What lies beside a model: config and progress of a checkpoint, and its report, which a
    registered model has too, and data set, where they are still there."""
    try:
        config = RunConfig.model_validate_json((model / CONFIG_FILE).read_bytes())
        progress = read_progress(model)
    except (OSError, ValidationError, CheckpointError):
        return ModelCardData(name=model.resolve().name)  # a model without a run, as an imported one
    run = model.resolve().parent.parent
    return ModelCardData(
        name=config.run.name,
        config=config,
        dataset=_dataset((run.parent.parent, config.run.root), progress.dataset_fingerprint),
        tokens_seen=progress.tokens_seen,
        step=progress.step,
        report=_report((run, model), progress.step),
    )


def evaluation_config(
    model: Path, facts: ModelCardData, config: str | None, overrides: Mapping[str, Any]
) -> RunConfig:
    """How a model is to be evaluated: as `config` says, else as its own run was to be, with the
    overrides laid over it; the network is the model's own. Raises `ConfigError` for a model
    without a run where no config is given."""
    if config is not None:
        raw = read_toml(Path(config))
    elif facts.config:
        raw = facts.config.model_dump(mode="json")
    else:
        rule = "has no run beside it that would say on which data to evaluate it"
        remedy = "give --config CONFIG, whose [data] and [evaluation] are then used"
        raise ConfigError(Problem("MODEL", str(model), rule, remedy))
    section = {"model": load_model_section(model).model_dump(mode="json")}
    return build_config(merge_overrides(merge_overrides(raw, overrides), section))


def _dataset(roots: Iterable[Path], fingerprint: str) -> DatasetManifest | None:
    kinds = ("datasets", DERIVED_DATASETS)
    for path in (p for root in roots for kind in kinds for p in root.glob(f"{kind}/*/{MANIFEST}")):
        with contextlib.suppress(OSError, ValidationError, DatasetError):
            manifest = read_manifest(path.parent)
            if manifest.fingerprint == fingerprint:
                return manifest
    return None


def _report(folders: Iterable[Path], step: int) -> EvaluationReport | None:
    for folder in folders:
        report = read_report_file(folder / REPORT_FILE)
        if report and report.step == step:
            return report
    return None
