"""The checkpoints of a run: which there are, whether they are sound, which stay. Without torch.

A checkpoint is a folder `checkpoints/step-00000250`: safetensors and JSON, nothing pickled
(`gpt.training.checkpoint.format`). It is written under a hidden name, every file fsynced,
`COMPLETE` with the checksums last, then renamed; what has no `COMPLETE` under its final name does
not exist. One that fails its checksums is set aside, and the one before it counts.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from gpt.artifacts import CheckpointRef
from gpt.config.schema import TrainingSection
from gpt.errors import CheckpointError, Problem
from gpt.files import compute_sha256, write_text

logger = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
PROGRESS_FILE = "progress.json"
MARKER_FILE = "COMPLETE"
BEST_FILE = "best.json"
BATCH_SIZE_FILE = "batch_size.json"
DAMAGED = "damaged-"
ABANDONED = "abandoned-"


class TrainingProgress(BaseModel):
    """How far the run has come. `position` counts training sequences taken or passed over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    position: int
    tokens_seen: int
    finished: bool
    dataset_fingerprint: str
    scaler: dict[str, float] = {}
    """State of the float16 gradient scaler; empty for the other types."""
    skipped_steps: int = 0
    recent_losses: tuple[float, ...] = ()
    """What the next losses are held against (gpt.training.divergence)."""


class Best(BaseModel):
    """The checkpoint with the lowest validation loss of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    loss: float


# --- kept or not ----------------------------------------------------------------------------------


def check_free_space(parent: Path, size_bytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < size_bytes:
        rule = f"{os.strerror(errno.ENOSPC)}: {size_bytes:,} bytes are needed, {free:,} are free"
        raise OSError(errno.ENOSPC, rule, str(parent))


def remove_partial_checkpoints(folder: Path) -> None:
    """What a process left behind that was killed while it wrote or removed a checkpoint."""
    for path in (folder / "checkpoints").glob(".*-step-*"):
        shutil.rmtree(path, ignore_errors=True)


def prune_checkpoints(folder: Path, training: TrainingSection) -> None:
    """Keeps the newest `checkpoints_kept`, every `checkpoint_keep_every`-th step, and the best."""
    complete, best = complete_checkpoints(folder), read_best(folder)
    for path in complete[training.checkpoints_kept :]:
        step, every = checkpoint_step(path), training.checkpoint_keep_every
        if not (best and step == best.step) and not (every and step % every == 0):
            _remove_checkpoint(path)
    for path in (folder / "checkpoints").glob(f"{ABANDONED}step-*"):
        if path.name.removeprefix(ABANDONED) <= complete[0].name:
            _remove_checkpoint(path)


def abandon_latest(folder: Path) -> None:
    """Set aside the newest checkpoint, if there is one before it, until a newer one is written."""
    complete = complete_checkpoints(folder)
    if len(complete) > 1:
        complete[0].rename(complete[0].with_name(ABANDONED + complete[0].name))


def restore_abandoned(folder: Path) -> None:
    """Undo what `abandon_latest` did."""
    for path in (folder / "checkpoints").glob(f"{ABANDONED}step-*"):
        back = path.with_name(path.name.removeprefix(ABANDONED))
        if not back.exists():
            path.rename(back)


def _remove_checkpoint(path: Path) -> None:
    """Out of sight first: killed half-way, this leaves nothing that looks like a checkpoint."""
    removing = path.with_name(f".removing-{path.name}")
    path.rename(removing)
    shutil.rmtree(removing, ignore_errors=True)


def write_batch_size(folder: Path, batch_size: int) -> None:
    """The micro-batch with which a group starts again that ran out of memory."""
    write_text(folder / BATCH_SIZE_FILE, json.dumps(batch_size))


def read_batch_size(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / BATCH_SIZE_FILE).read_bytes()))
    except (FileNotFoundError, ValueError):
        return None


def record_best(folder: Path, step: int, loss: float) -> None:
    """Tell of the validation loss of a step that has a checkpoint."""
    best = read_best(folder)
    if best is None or loss < best.loss or best.step == step:  # the same step after a return
        path = folder / "checkpoints" / BEST_FILE
        write_text(path, Best(step=step, loss=loss).model_dump_json(indent=2))


def read_best(folder: Path) -> Best | None:
    """The best so far of those that `record_best` was told of, where it is still there."""
    try:
        best = Best.model_validate_json((folder / "checkpoints" / BEST_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return best if is_complete(folder / "checkpoints" / f"step-{best.step:08d}") else None


# --- found ---------------------------------------------------------------------------------------


def complete_checkpoints(folder: Path) -> list[Path]:
    """Below the run's `folder`, newest first; complete, but not checked."""
    return sorted(filter(is_complete, (folder / "checkpoints").glob("step-*")), reverse=True)


def is_complete(checkpoint: Path) -> bool:
    return (checkpoint / MARKER_FILE).is_file()


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(folder: Path) -> CheckpointRef | None:
    """The newest complete checkpoint below the run's `folder`, if any; its files unchecked."""
    for path in complete_checkpoints(folder):
        return checkpoint_ref(path, read_progress(path))
    return None


def latest_valid_checkpoint(folder: Path) -> CheckpointRef | None:
    """The newest checkpoint whose files are what was written. A newer one that fails is set aside
    under another name, with a warning."""
    for path in complete_checkpoints(folder):
        try:
            verify_checkpoint(path)
            return checkpoint_ref(path, read_progress(path))
        except CheckpointError as error:
            aside = _unused(path.with_name(DAMAGED + path.name))
            path.rename(aside)
            problem = error.problems[0]
            logger.warning(
                "%s: %s; the checkpoint is set aside as %s and the one before it is used",
                problem.key,
                problem.rule,
                aside.name,
            )
    return None


def _unused(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def read_progress(checkpoint: Path) -> TrainingProgress:
    """Raises `CheckpointError` where the file is missing or unreadable."""
    path = checkpoint / PROGRESS_FILE
    try:
        return TrainingProgress.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise damaged_error(path, str(error).splitlines()[0]) from error


def verify_checkpoint(checkpoint: Path) -> None:
    """Raises `CheckpointError` naming the first file that is missing or altered."""
    marker = checkpoint / MARKER_FILE
    try:
        checksums = json.loads(marker.read_text())
    except (OSError, ValueError) as error:
        raise damaged_error(marker, "missing or unreadable") from error
    for name, checksum in checksums.items():
        path = checkpoint / name
        if not path.is_file():
            raise damaged_error(path, "missing")
        if compute_sha256(path) != checksum:
            raise damaged_error(path, "its sha256 is not the one written down when it was made")


def checkpoint_ref(path: Path, progress: TrainingProgress) -> CheckpointRef:
    return CheckpointRef(
        folder=path,
        step=progress.step,
        tokens_seen=progress.tokens_seen,
        finished=progress.finished,
    )


def damaged_error(path: Path, what: str) -> CheckpointError:
    remedy = f"remove {path.parent} to go on from the checkpoint before it"
    return CheckpointError(Problem(str(path), "", what, remedy))
