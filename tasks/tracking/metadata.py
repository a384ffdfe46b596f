"""What is known of a run at its start: parameters, tags, dataset and first files for MLflow."""

import json
import os
import platform
import subprocess
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.shards import MANIFEST
from gpt.data.summary import write_summary
from gpt.files import write_text
from gpt.hardware.device import pick_device
from gpt.preflight.parameters import count_parameters
from gpt.schedule import peak_learning_rates
from tasks.tracking.journal import DatasetInfo, PendingMetadata

DIRTY_SUFFIX = "+changes"
MAX_DIGEST_LENGTH = 36
"""MLflow's limit, in characters."""


def resolve_tracking_uri(config: RunConfig) -> str:
    """Return tracking.uri, else MLFLOW_TRACKING_URI, else the SQLite store under run.root."""
    return config.tracking.uri or default_tracking_uri(config.run.root)


def default_tracking_uri(root: Path) -> str:
    """Return MLFLOW_TRACKING_URI, else the SQLite store under `root`."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given or f"sqlite:///{mlflow_folder(root) / 'mlflow.db'}"


def mlflow_folder(root: Path) -> Path:
    return root.resolve() / "mlflow"


def build_run_metadata(
    config: RunConfig, dataset: DatasetManifest, folder: Path, compared: Mapping[str, str] | None
) -> PendingMetadata:
    """Describe a run, or the parent run of a comparison: the parameters `compared`, and what all
    compared runs share."""
    commit, files = "", {}
    if compared:
        name = folder.name.rpartition("-")[0]
        shared = ("dataset.fingerprint", "evaluation.tokens")
        parameters = run_parameters(config, dataset)
        parameters = dict(compared) | {key: parameters[key] for key in shared}
    else:
        name, parameters, commit = config.run.name, run_parameters(config, dataset), git_commit()
        write_text(folder / "config.json", config.model_dump_json(indent=2) + "\n")
        described = {MANIFEST: dataset.folder / MANIFEST} | write_summary(dataset)
        files = {"config.json": folder / "config.json"}
        files |= {f"dataset/{file}": path for file, path in described.items() if path.exists()}
    uri = resolve_tracking_uri(config)
    artifacts = (mlflow_folder(config.run.root) / "artifacts").as_uri()
    return PendingMetadata(
        uid=uuid.uuid4().hex,
        name=name,
        experiment=config.tracking.experiment,
        uri=uri,
        artifacts=artifacts if uri.startswith("sqlite:///") else "",
        parameters=parameters | ({"git.commit": commit} if commit else {}),
        tags={"mlflow.source.git.commit": commit.removesuffix(DIRTY_SUFFIX)} if commit else {},
        dataset=_describe_dataset(dataset),
        files={file: path.resolve() for file, path in files.items()},
    )


def run_parameters(config: RunConfig, dataset: DatasetManifest) -> dict[str, str]:
    """Return every config value, and what follows from the config, the dataset and the machine."""
    device = pick_device(config.hardware.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = ("overnight", "torch", "mlflow", "prefect", "polars", "tiktoken")
    derived = {
        "parameters": count_parameters(config.model).total,
        "tokens_per_step": config.tokens_per_step,
        **{f"peak_lr.{name}": rate for name, rate in vars(peak_learning_rates(config)).items()},
        "dataset.fingerprint": dataset.fingerprint,
        "dataset.train_tokens": dataset.train.tokens,
        "dataset.validation_tokens": dataset.validation.tokens,
        "device": f"{device.type}: {name}",
        "versions.python": platform.python_version(),
        **{f"versions.{package}": version(package) for package in packages},
    }
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in (config.flatten() | derived).items()
    }


def git_commit() -> str:
    """Return the commit of the code, with "+changes" if the tree is dirty; "" outside of git."""
    code = Path(__file__).resolve().parents[2]
    dirty = f"--dirty={DIRTY_SUFFIX}"
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", dirty]
    # An installed package may lie inside another project's repository.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(code.parent)}
    try:
        return subprocess.check_output(
            command, cwd=code, env=environment, stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _describe_dataset(dataset: DatasetManifest) -> DatasetInfo:
    sources = tuple(source.path for source in dataset.sources)
    first = Path(sources[0])
    return DatasetInfo(
        name=first.stem if len(sources) == 1 else first.parent.name or "parquet",
        digest=dataset.fingerprint[:MAX_DIGEST_LENGTH],
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
