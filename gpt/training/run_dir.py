"""Find or create the folder of a run: the same config resumes a run, a changed one starts another.

A run is identified by its name and the fingerprint of what determines its weights at every step:
model, data, optimizer, schedule, seed, dtype and the tokens per step. What may change between two
starts is not part of it: steps, intervals, the split of a step into micro-batches, memory savings,
device, tracking.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig, fingerprint
from gpt.errors import ConfigError, Problem
from gpt.files import write_text
from gpt.training.checkpoint.retention import latest_checkpoint, unused_path

RUN_FILE = "run.json"
IDENTITY = ("model.", "optimizer.", "schedule.", "training.dtype", "training.seed")
"""What the keys of the settings begin with that belong to a run's identity."""


class RunRecord(BaseModel):
    """`run.json` in the folder of a run."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    identity: str
    max_steps: int
    dataset_fingerprint: str


def identity_values(config: RunConfig, dataset_fingerprint: str) -> dict[str, Any]:
    """Return the settings of a run's identity by dotted key."""
    values = {key: value for key, value in config.flatten().items() if key.startswith(IDENTITY)}
    if init_from := config.training.init_from:  # runs older than this key keep their identity
        values["training.init_from"] = init_from
    return values | {
        "sequences_per_step": config.sequences_per_step,  # batch_size * grad_acc
        "dataset": dataset_fingerprint,
    }


def run_identity(config: RunConfig, dataset_fingerprint: str) -> str:
    """Return the fingerprint of `identity_values`."""
    return fingerprint(identity_values(config, dataset_fingerprint))


def open_run_dir(config: RunConfig, dataset: DatasetManifest, fresh: bool = False) -> Path:
    """Return the folder of this run, `<root>/train/<name>-<8 hex>`, created if it is a new run.

    A run is resumed if its identity is the same and it has the same `max_steps`, or was interrupted
    before reaching them. With `fresh`, always create a new folder and leave the old one alone.
    """
    parent = config.run.root / "train"
    identity = run_identity(config, dataset.fingerprint)
    folder = None if fresh else find_run_dir(config, dataset)
    folder = folder or unused_path(parent / f"{config.run.name}-{identity[:8]}")
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
    """Return the folder that `open_run_dir` would resume, if any, without writing anything."""
    identity = run_identity(config, dataset.fingerprint)
    max_steps, candidates = config.training.max_steps, []
    for path in (config.run.root / "train").glob(f"{config.run.name}-*/{RUN_FILE}"):
        record = RunRecord.model_validate_json(path.read_text())
        if record.identity == identity and _may_resume(path.parent, record, max_steps):
            candidates.append((record.max_steps == max_steps, path.stat().st_ctime_ns, path.parent))
    return max(candidates)[-1] if candidates else None


def find_run_dir_by_name(name: str, root: Path) -> Path:
    """Return the folder with the path or name `name`, or the newest one of the runs called `name`
    below `root`. Raises `ConfigError` if there is none."""
    parent = root / "train"
    candidates = [Path(name), parent / name, *_newest_first(parent.glob(f"{Path(name).name}-*"))]
    for folder in candidates:
        if (folder / RUN_FILE).is_file():
            return folder
    known = ", ".join(path.name for path in _newest_first(parent.glob("*"))) or "none"
    rule = f"is neither a run folder nor the name of a run in {parent}"
    raise ConfigError(Problem("RUN", name, rule, f"give one of: {known}, or another --root"))


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _may_resume(folder: Path, record: RunRecord, max_steps: int) -> bool:
    if record.max_steps == max_steps:
        return True
    checkpoint = latest_checkpoint(folder)
    return checkpoint is None or (not checkpoint.finished and checkpoint.step < max_steps)
