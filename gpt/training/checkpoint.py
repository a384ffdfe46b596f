"""Everything that a run needs to go on, written so that a crash never costs the one before.

A checkpoint is a folder `checkpoints/step-00000250`: safetensors and JSON, nothing pickled. It is
written under a hidden name, every file fsynced, `COMPLETE` with the checksums last, then renamed;
what has no `COMPLETE` under its final name does not exist.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt.artifacts import CheckpointRef
from gpt.config import RunConfig
from gpt.errors import CheckpointError, Problem
from gpt.files import sha256_of, sync

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"
PROGRESS_FILE = "progress.json"
CONFIG_FILE = "config.json"
MARKER_FILE = "COMPLETE"


class Progress(BaseModel):
    """How far the run has come. `position` counts training sequences taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    position: int
    tokens_seen: int
    finished: bool
    scaler: dict[str, float] = {}
    """State of the float16 gradient scaler; empty for the other types."""


def write_checkpoint(
    folder: Path,
    config: RunConfig,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    progress: Progress,
    keep: int,
) -> CheckpointRef:
    """Write a checkpoint below the run's `folder`, then remove all but the newest `keep`."""
    parent = folder / "checkpoints"
    final = parent / f"step-{progress.step:08d}"
    writing = parent / f".writing-{final.name}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    save_file(
        {n: p.detach().contiguous() for n, p in model.state_dict().items()}, writing / MODEL_FILE
    )
    save_file(_optimizer_tensors(model, optimizers), writing / OPTIMIZER_FILE)
    save_file(random_states(), writing / RANDOM_FILE)
    (writing / PROGRESS_FILE).write_text(progress.model_dump_json(indent=2))
    (writing / CONFIG_FILE).write_text(config.model_dump_json(indent=2))
    files = sorted(writing.iterdir())
    for path in files:
        sync(path)
    checksums = {path.name: sha256_of(path) for path in files}
    (writing / MARKER_FILE).write_text(json.dumps(checksums, indent=2))
    sync(writing / MARKER_FILE)
    sync(writing)
    if final.exists():  # set aside by nobody, so damaged or from before a rewind
        shutil.rmtree(final)
    writing.rename(final)
    sync(parent)
    for old in sorted(parent.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return _reference(final, progress)


def latest_checkpoint(folder: Path) -> CheckpointRef | None:
    """The newest complete checkpoint below the run's `folder`, if any."""
    for path in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        if (path / MARKER_FILE).is_file():
            return _reference(path, read_progress(path))
    return None


def read_progress(checkpoint: Path) -> Progress:
    """Raises `CheckpointError` where the file is missing or unreadable."""
    path = checkpoint / PROGRESS_FILE
    try:
        return Progress.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from error


def restore(
    checkpoint: Path, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> Progress:
    """Load weights, optimizer and random states in place, after their checksums were checked.

    Raises `CheckpointError` for a missing or altered file, or one made by another model.
    """
    verify(checkpoint)
    try:
        model.load_state_dict(load_file(checkpoint / MODEL_FILE))
    except RuntimeError as error:
        raise _damaged(checkpoint / MODEL_FILE, f"another model's: {error}") from error
    _load_optimizers(load_file(checkpoint / OPTIMIZER_FILE), model, optimizers)
    set_random_states(load_file(checkpoint / RANDOM_FILE))
    return read_progress(checkpoint)


def verify(checkpoint: Path) -> None:
    """Raises `CheckpointError` naming the first file that is missing or altered."""
    marker = checkpoint / MARKER_FILE
    try:
        checksums = json.loads(marker.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(marker, "missing or unreadable") from error
    for name, checksum in checksums.items():
        path = checkpoint / name
        if not path.is_file():
            raise _damaged(path, "missing")
        if sha256_of(path) != checksum:
            raise _damaged(path, "its sha256 is not the one written down when it was made")


def _reference(path: Path, progress: Progress) -> CheckpointRef:
    return CheckpointRef(
        folder=path,
        step=progress.step,
        tokens_seen=progress.tokens_seen,
        finished=progress.finished,
    )


def _damaged(path: Path, what: str) -> CheckpointError:
    remedy = f"remove {path.parent} to go on from the checkpoint before it"
    return CheckpointError(Problem(str(path), "", what, remedy))


def _optimizer_tensors(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """State by parameter name, as `h.0.attn.c_attn.weight/exp_avg`."""
    names: dict[Tensor, str] = {tensor: name for name, tensor in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value.detach().contiguous()
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _load_optimizers(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        states.setdefault(name, {})[key] = value
    for optimizer in optimizers:
        saved = optimizer.state_dict()
        order = [names[p] for group in optimizer.param_groups for p in group["params"]]
        saved["state"] = {i: states[name] for i, name in enumerate(order) if name in states}
        optimizer.load_state_dict(saved)


def random_states() -> dict[str, Tensor]:
    """torch's random states, of the CPU and of the current GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
