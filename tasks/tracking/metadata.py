"""What MLflow is to know of a run beside its metrics: parameters, tags, data set, first files."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.shards import MANIFEST
from gpt.data.summary import write_summary
from gpt.files import write_text
from gpt.hardware.device import pick_device
from gpt.model.architectures import build_model
from gpt.schedule import peak_learning_rates
from tasks.tracking.journal import DatasetInput, PendingMetadata

CHANGED = "+changes"
DIGEST_LENGTH = 36
"""Characters that MLflow has room for."""


def tracking_uri(config: RunConfig) -> str:
    """The config's server, else MLFLOW_TRACKING_URI, else SQLite under the run's root."""
    return config.tracking.uri or default_tracking_uri(config.run.root)


def default_tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, else SQLite under `root`."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given or f"sqlite:///{mlflow_folder(root) / 'mlflow.db'}"


def mlflow_folder(root: Path) -> Path:
    return root.resolve() / "mlflow"


def describe(config: RunConfig, dataset: DatasetManifest, folder: Path) -> PendingMetadata:
    resolved = folder / "config.json"
    write_text(resolved, config.model_dump_json(indent=2) + "\n")
    commit = git_commit()
    return PendingMetadata(
        uid=uuid.uuid4().hex,
        name=config.run.name,
        experiment=config.tracking.experiment,
        uri=tracking_uri(config),
        artifacts=_artifact_location(config),
        parameters=run_parameters(config, dataset) | ({"git.commit": commit} if commit else {}),
        tags={"mlflow.source.git.commit": commit.removesuffix(CHANGED)} if commit else {},
        dataset=_dataset_input(dataset),
        files={"config.json": resolved.resolve()} | _dataset_files(dataset),
    )


def describe_comparison(
    config: RunConfig, dataset: DatasetManifest, folder: Path, compared: Mapping[str, str]
) -> PendingMetadata:
    """Of the run above those that are compared: what they share, and `compared`."""
    shared = {
        "dataset.fingerprint": dataset.fingerprint,
        "evaluation.tokens": _text(config.evaluation.tokens),
    }
    return PendingMetadata(
        uid=uuid.uuid4().hex,
        name=folder.name.rpartition("-")[0],
        experiment=config.tracking.experiment,
        uri=tracking_uri(config),
        artifacts=_artifact_location(config),
        parameters={**compared, **shared},
        tags={},
        dataset=_dataset_input(dataset),
    )


def _dataset_files(dataset: DatasetManifest) -> dict[str, Path]:
    files = {MANIFEST: dataset.folder / MANIFEST} | write_summary(dataset)
    return {f"dataset/{name}": path.resolve() for name, path in files.items() if path.exists()}


def _artifact_location(config: RunConfig) -> str:
    """Beside the SQLite store; a server has a place of its own."""
    if not tracking_uri(config).startswith("sqlite:///"):
        return ""
    return (mlflow_folder(config.run.root) / "artifacts").as_uri()


def run_parameters(config: RunConfig, dataset: DatasetManifest) -> dict[str, str]:
    """Every config value, and what follows from the config, the data and the machine."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config.model).parameters())
    device = pick_device(config.hardware.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    derived = {
        "parameters": parameters,
        "tokens_per_step": config.tokens_per_step,
        **{f"peak_lr.{name}": rate for name, rate in vars(peak_learning_rates(config)).items()},
        "dataset.fingerprint": dataset.fingerprint,
        "dataset.train_tokens": dataset.train.tokens,
        "dataset.validation_tokens": dataset.validation.tokens,
        "device": f"{device.type}: {name}",
        "versions.python": platform.python_version(),
    }
    derived |= {
        f"versions.{package}": version(package)
        for package in ("overnight", "torch", "mlflow", "prefect", "polars", "tiktoken")
    }
    return {key: _text(value) for key, value in (config.flatten() | derived).items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def git_commit() -> str:
    """The commit of the code, with "+changes" where files differ from it; "" outside of git."""
    code = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(code)]
    try:
        # The tree must be the code's own: an installed package may lie inside another one.
        top = _output([*git, "rev-parse", "--show-toplevel"])
        if Path(top) != code:
            return ""
        changes = _output([*git, "status", "--porcelain", "--untracked-files=no"])
        return _output([*git, "rev-parse", "HEAD"]) + (CHANGED if changes else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _dataset_input(dataset: DatasetManifest) -> DatasetInput:
    sources = tuple(source.path for source in dataset.sources)
    first = Path(sources[0])
    return DatasetInput(
        name=first.stem if len(sources) == 1 else first.parent.name or "parquet",
        digest=dataset.fingerprint[:DIGEST_LENGTH],
        sources=sources,
        text_column=dataset.text_column,
        profile={
            "documents": dataset.train.documents + dataset.validation.documents,
            "train_tokens": dataset.train.tokens,
            "validation_tokens": dataset.validation.tokens,
            "text_bytes": dataset.train.text_bytes + dataset.validation.text_bytes,
            "tokenizer": dataset.tokenizer,
        },
    )
