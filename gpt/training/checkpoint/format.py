"""The format of a checkpoint: copy the state of a run to memory, write it to files, load it."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpt.artifacts import CheckpointRef
from gpt.config.schema import RunConfig
from gpt.errors import CheckpointError, Problem, first_line
from gpt.files import compute_sha256, sync
from gpt.model.section import CONFIG_FILE, MODEL_FILE
from gpt.training.checkpoint.retention import (
    MARKER_FILE,
    OPTIMIZER_FILE,
    PROGRESS_FILE,
    RANDOM_FILE,
    TrainingProgress,
    check_free_space,
    damaged_error,
    is_complete,
    prune_checkpoints,
    read_checkpoint_ref,
    read_progress,
    remove_partial_checkpoints,
)
from gpt.training.distributed.sharding import full_tensor, load_full_weights, shard_like
from gpt.training.run_dir import identity_values

SMALL_FILES_BYTES = 1_000_000
"""Upper bound for random states, progress, config and checksums."""

Optimizers = Iterable[torch.optim.Optimizer]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A checkpoint in CPU memory, which shares nothing with the model."""

    config: RunConfig
    progress: TrainingProgress
    tensors: Mapping[str, Mapping[str, Tensor]]
    """File name -> tensor name -> tensor."""

    @property
    def size_bytes(self) -> int:
        return SMALL_FILES_BYTES + sum(
            tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values()
        )


def take_snapshot(
    config: RunConfig,
    model: nn.Module,
    optimizers: Optimizers,
    progress: TrainingProgress,
    keep: bool = True,
) -> Snapshot:
    """Copy the state of a run to CPU memory. Every process of a group must call this, to gather
    sharded tensors; the snapshot is empty in those that do not `keep` it."""
    tensors = {
        MODEL_FILE: model.state_dict(),
        OPTIMIZER_FILE: _optimizer_tensors(model, optimizers),
        RANDOM_FILE: get_random_states(),
    }
    copies: dict[str, dict[str, Tensor]] = {file: {} for file in tensors}
    for file, named in tensors.items():
        for name, tensor in named.items():
            gathered = full_tensor(tensor.detach())  # one at a time: together they may not fit
            if keep:
                copies[file][name] = gathered.to("cpu", copy=True)
    return Snapshot(config, progress, copies)


def write_checkpoint(folder: Path, snapshot: Snapshot) -> CheckpointRef:
    """Write a checkpoint of the run in `folder`, then remove those that need not be kept.

    Raises `OSError` or `SafetensorError` if the disk is full or fails; older checkpoints stay.
    """
    parent = folder / "checkpoints"
    final = parent / f"step-{snapshot.progress.step:08d}"
    writing = parent / f".writing-{final.name}"
    parent.mkdir(parents=True, exist_ok=True)
    remove_partial_checkpoints(folder)
    if not is_complete(final):
        check_free_space(parent, snapshot.size_bytes)
        _write_files(writing, snapshot)
        shutil.rmtree(final, ignore_errors=True)  # incomplete
        writing.rename(final)
        sync(parent)
    prune_checkpoints(folder, snapshot.config.training)
    return read_checkpoint_ref(final)


def _write_files(writing: Path, snapshot: Snapshot) -> None:
    writing.mkdir()
    for name, tensors in snapshot.tensors.items():
        save_file({n: tensor.contiguous() for n, tensor in tensors.items()}, writing / name)
    (writing / PROGRESS_FILE).write_text(snapshot.progress.model_dump_json(indent=2))
    (writing / CONFIG_FILE).write_text(snapshot.config.model_dump_json(indent=2))
    files = sorted(writing.iterdir())
    for path in files:
        sync(path)
    checksums = {path.name: compute_sha256(path) for path in files}
    (writing / MARKER_FILE).write_text(json.dumps(checksums, indent=2))
    sync(writing / MARKER_FILE)
    sync(writing)


def load_checkpoint(
    checkpoint: Path,
    config: RunConfig,
    dataset_fingerprint: str,
    model: nn.Module,
    optimizers: Optimizers,
) -> TrainingProgress:
    """Load weights, optimizer states and random states of a verified checkpoint.

    Raises `CheckpointError` for each key in which its model, dataset or optimizer differs from the
    config.
    """
    progress = read_progress(checkpoint)
    _check_same_run(checkpoint, progress, config, dataset_fingerprint)
    load_full_weights(model, load_file(checkpoint / MODEL_FILE))
    _load_optimizers(load_file(checkpoint / OPTIMIZER_FILE), model, optimizers)
    set_random_states(load_file(checkpoint / RANDOM_FILE))
    return progress


def _check_same_run(
    checkpoint: Path, progress: TrainingProgress, config: RunConfig, dataset_fingerprint: str
) -> None:
    path = checkpoint / CONFIG_FILE
    try:
        written = RunConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise damaged_error(path, first_line(error)) from error
    saved = identity_values(written, progress.dataset_fingerprint)
    current = identity_values(config, dataset_fingerprint)
    problems = [
        Problem(
            key,
            str(current[key]),
            f"the checkpoint {checkpoint} was written with {saved[key]}",
            "set it back to resume, or start a new run with another run.name or --fresh",
        )
        for key in current
        if current[key] != saved[key]
    ]
    if problems:
        raise CheckpointError(*problems)


def _optimizer_tensors(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Return optimizer states by parameter name, e.g. `h.0.attn.c_attn.weight/exp_avg`."""
    names: dict[Tensor, str] = {tensor: name for name, tensor in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _load_optimizers(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizers: Optimizers
) -> None:
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    states: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        states.setdefault(name, {})[key] = value
    for optimizer in optimizers:
        saved = optimizer.state_dict()
        order = [names[p] for group in optimizer.param_groups for p in group["params"]]
        saved["state"] = {
            i: {key: shard_like(value, parameters[name]) for key, value in states[name].items()}
            for i, name in enumerate(order)
            if name in states
        }
        optimizer.load_state_dict(saved)


def get_random_states() -> dict[str, Tensor]:
    """Return torch's random states, of the CPU and of the current GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Restore what `get_random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
