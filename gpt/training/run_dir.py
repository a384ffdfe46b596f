"""Which folder a run lives in: starting is resuming, and a changed run is a new one by itself.

A run's identity is its name and the fingerprint of what shapes its weights
(`gpt.training.identity`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.errors import ConfigError, Problem
from gpt.files import write_text
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.identity import run_identity

RUN_FILE = "run.json"


class RunRecord(BaseModel):
    """`run.json` in the run's folder: what the run is, for whoever starts it again."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    identity: str
    max_steps: int
    dataset_fingerprint: str


def open_run_dir(config: RunConfig, dataset: DatasetManifest, fresh: bool = False) -> Path:
    """`<root>/train/<name>-<8 hex>`: the folder of this run where it was started before, else new.

    The same run is one of the same identity that asked for the same `max_steps`, or that was
    interrupted before reaching them. `fresh` always begins a new folder and leaves the old alone.
    """
    parent = config.run.root / "train"
    identity = run_identity(config, dataset.fingerprint)
    folder = None if fresh else _started_before(parent, config, identity)
    folder = folder or _unused(parent, f"{config.run.name}-{identity[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    record = RunRecord(
        identity=identity,
        max_steps=config.training.max_steps,
        dataset_fingerprint=dataset.fingerprint,
    )
    text = json.dumps(record.model_dump() | {"config": config.model_dump(mode="json")}, indent=2)
    write_text(folder / RUN_FILE, text)
    return folder


def find_run_dir(config: RunConfig, dataset: DatasetManifest) -> Path | None:
    """The folder that `open_run_dir` would go on in, if there is one; writes nothing."""
    identity = run_identity(config, dataset.fingerprint)
    return _started_before(config.run.root / "train", config, identity)


def find_run_dir_by_name(name: str, root: Path) -> Path:
    """The folder that `name` is the path of, or the newest of a run of that name, or of that folder
    name, below `root`. Raises `ConfigError` where there is none."""
    parent = root / "train"
    candidates = [Path(name), parent / name, *_newest_first(parent.glob(f"{Path(name).name}-*"))]
    for folder in candidates:
        if (folder / RUN_FILE).is_file():
            return folder
    known = ", ".join(path.name for path in _newest_first(parent.glob("*"))) or "none"
    rule = f"is neither a run's folder nor the name of a run in {parent}"
    raise ConfigError(Problem("RUN", name, rule, f"give one of: {known}, or another --root"))


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _started_before(parent: Path, config: RunConfig, identity: str) -> Path | None:
    """The newest folder of this identity that `config` may go on in."""
    wanted = config.training.max_steps
    candidates = []
    for path in parent.glob(f"{config.run.name}-*/{RUN_FILE}"):
        record = RunRecord.model_validate_json(path.read_text())
        if record.identity == identity and _may_go_on(path.parent, record, wanted):
            candidates.append((record.max_steps == wanted, path.stat().st_ctime_ns, path.parent))
    return max(candidates)[-1] if candidates else None


def _may_go_on(folder: Path, record: RunRecord, max_steps: int) -> bool:
    if record.max_steps == max_steps:
        return True
    checkpoint = latest_checkpoint(folder)
    return checkpoint is None or (not checkpoint.finished and checkpoint.step < max_steps)


def _unused(parent: Path, name: str) -> Path:
    number = 1
    while (path := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path
