"""The checkpoints of a run: find the latest valid one, and keep the right ones. Without torch.

A checkpoint is a folder `checkpoints/step-00000250` of safetensors and JSON files, nothing pickled
(`gpt.training.checkpoint.format`). It is written under a hidden name, every file fsynced and
`COMPLETE` with the checksums last, then renamed; a folder without `COMPLETE` does not count. A
checkpoint that fails its checksums is set aside, and the one before it is used.
"""

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt.artifacts import CheckpointRef
from gpt.config.schema import TrainingSection
from gpt.errors import CheckpointError, Problem, first_line
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
    """How far a run is. `position` counts the training sequences that were used or excluded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    position: int
    tokens_seen: int
    finished: bool
    dataset_fingerprint: str
    scaler: dict[str, Annotated[int | float, Field(union_mode="left_to_right")]] = {}
    """State of the gradient scaler for float16; empty for other types. Whole numbers are ints: its
    intervals must be, and older checkpoints hold them as floats."""
    skipped_steps: int = 0
    recent_losses: tuple[float, ...] = ()
    """What the next losses are compared with (gpt.training.divergence)."""


class Best(BaseModel):
    """The checkpoint with the lowest validation loss of the run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    loss: float


# --- find ----------------------------------------------------------------------------------------


def complete_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of the run in `folder`, newest first, not verified."""
    return sorted(filter(is_complete, (folder / "checkpoints").glob("step-*")), reverse=True)


def is_complete(checkpoint: Path) -> bool:
    return (checkpoint / MARKER_FILE).is_file()


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(folder: Path) -> CheckpointRef | None:
    """Return the newest complete checkpoint of the run in `folder`, if any, not verified."""
    complete = complete_checkpoints(folder)
    return read_checkpoint_ref(complete[0]) if complete else None


def latest_valid_checkpoint(folder: Path) -> CheckpointRef | None:
    """Return the newest checkpoint that passes its checksums, if any. Those that fail are renamed,
    with a warning."""
    for path in complete_checkpoints(folder):
        try:
            verify_checkpoint(path)
            return read_checkpoint_ref(path)
        except CheckpointError as error:
            damaged = unused_path(path.with_name(DAMAGED + path.name))
            path.rename(damaged)
            problem = error.problems[0]
            logger.warning(
                "%s: %s; the checkpoint is set aside as %s and the one before it is used",
                problem.key,
                problem.rule,
                damaged.name,
            )
    return None


def unused_path(path: Path) -> Path:
    """Return `path`, or the first of `path`-2, `path`-3, ... that does not exist."""
    number, unused = 1, path
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.name}-{number}")
    return unused


def verify_checkpoint(checkpoint: Path) -> None:
    """Raise `CheckpointError` if a file is missing or altered."""
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
            raise damaged_error(path, f"its sha256 differs from the one in {MARKER_FILE}")


def read_progress(checkpoint: Path) -> TrainingProgress:
    """Read the progress of a checkpoint. Raises `CheckpointError` if it cannot be read."""
    path = checkpoint / PROGRESS_FILE
    try:
        return TrainingProgress.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise damaged_error(path, first_line(error)) from error


def read_checkpoint_ref(checkpoint: Path) -> CheckpointRef:
    progress = read_progress(checkpoint)
    return CheckpointRef(
        folder=checkpoint,
        step=progress.step,
        tokens_seen=progress.tokens_seen,
        finished=progress.finished,
    )


def damaged_error(path: Path, what: str) -> CheckpointError:
    remedy = f"remove {path.parent} to resume from the checkpoint before it"
    return CheckpointError(Problem(str(path), "", what, remedy))


# --- keep or remove ------------------------------------------------------------------------------


def prune_checkpoints(folder: Path, training: TrainingSection) -> None:
    """Keep the newest `checkpoints_kept`, every `checkpoint_keep_every`-th step and the best."""
    complete, best = complete_checkpoints(folder), read_best(folder)
    for path in complete[training.checkpoints_kept :]:
        step, every = checkpoint_step(path), training.checkpoint_keep_every
        if not (best and step == best.step) and not (every and step % every == 0):
            _remove_checkpoint(path)
    for path in (folder / "checkpoints").glob(f"{ABANDONED}step-*"):
        if path.name.removeprefix(ABANDONED) <= complete[0].name:
            _remove_checkpoint(path)


def abandon_latest(folder: Path) -> None:
    """Set the newest checkpoint aside, unless it is the only one, until a newer one is written."""
    complete = complete_checkpoints(folder)
    if len(complete) > 1:
        complete[0].rename(complete[0].with_name(ABANDONED + complete[0].name))


def restore_abandoned(folder: Path) -> None:
    """Undo `abandon_latest`."""
    for path in (folder / "checkpoints").glob(f"{ABANDONED}step-*"):
        original = path.with_name(path.name.removeprefix(ABANDONED))
        if not original.exists():
            path.rename(original)


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote or removed a checkpoint."""
    for path in (folder / "checkpoints").glob(".*-step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove_checkpoint(path: Path) -> None:
    # Hidden first, so that a kill in between leaves nothing that looks like a checkpoint.
    removing = path.with_name(f".removing-{path.name}")
    path.rename(removing)
    shutil.rmtree(removing, ignore_errors=True)


def check_free_space(parent: Path, size_bytes: int) -> None:
    """Raise OSError if the disk of `parent` has less than `size_bytes` free."""
    free = shutil.disk_usage(parent).free
    if free < size_bytes:
        rule = f"{os.strerror(errno.ENOSPC)}: {size_bytes:,} bytes are needed, {free:,} are free"
        raise OSError(errno.ENOSPC, rule, str(parent))


# --- small files of a run ------------------------------------------------------------------------


def record_best(folder: Path, step: int, loss: float) -> None:
    """Note the validation loss of a step that has a checkpoint, if it is the lowest so far."""
    best = read_best(folder)
    if best is None or loss < best.loss or best.step == step:  # the same step after a rollback
        path = folder / "checkpoints" / BEST_FILE
        write_text(path, Best(step=step, loss=loss).model_dump_json(indent=2))


def read_best(folder: Path) -> Best | None:
    """Return the best checkpoint that `record_best` recorded, if it still exists."""
    try:
        best = Best.model_validate_json((folder / "checkpoints" / BEST_FILE).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return best if is_complete(folder / "checkpoints" / f"step-{best.step:08d}") else None


def write_batch_size(folder: Path, batch_size: int) -> None:
    """Note the micro-batch with which a group restarts after running out of memory."""
    write_text(folder / BATCH_SIZE_FILE, json.dumps(batch_size))


def read_batch_size(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / BATCH_SIZE_FILE).read_bytes()))
    except (FileNotFoundError, ValueError):
        return None
