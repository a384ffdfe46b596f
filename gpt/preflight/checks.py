"""Checks that stop a run: they need more than the config's values, e.g. the GPU, the data, the
disk.

Each check yields a `Problem` for everything that fails. Checks that only warn are in
`gpt.preflight.warnings`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from gpt.config.schema import RunConfig
from gpt.errors import CheckpointError, Problem
from gpt.hardware.gpus import GIB
from gpt.model.section import MODEL_FILE, load_model_section
from gpt.preflight.figures import Figures
from gpt.preflight.memory import estimate_memory
from gpt.preflight.time import existing_ancestor


def gb(count: float) -> str:
    """Format bytes in decimal units, as disks are sold."""
    return f"{count / 1e9:.1f} GB"


def gib(count: float) -> str:
    """Format bytes in binary units, as GPUs are sold: one of "12 GB" has 12 x 2^30 bytes."""
    return f"{count / GIB:.1f} GiB"


def find_problems(figures: Figures) -> Iterator[Problem]:
    """Yield everything that keeps the run from working."""
    for check in (check_devices, check_memory, check_data, check_files, check_disk):
        yield from check(figures)


def check_devices(figures: Figures) -> Iterator[Problem]:
    hardware, gpu = figures.config.hardware, figures.gpu
    device, missing = hardware.device, f"this machine has {gpu.installed} NVIDIA GPUs"
    if gpu.is_named:  # the run is for another machine
        return
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= gpu.installed:
        remedy = 'use "auto" or "cpu", repair the driver, or give --gpu NAME for another machine'
        yield Problem("hardware.device", device, f"does not exist: {missing}", remedy)
    if figures.starting and device != "cpu" and 0 < gpu.installed < hardware.devices:
        remedy = f"set hardware.devices to {gpu.installed}, or use a machine that has more"
        yield Problem("hardware.devices", str(hardware.devices), f"too many: {missing}", remedy)


def check_memory(figures: Figures) -> Iterator[Problem]:
    if figures.fits is not False or figures.is_reduced_at_start:
        return
    config, gpu = figures.config, figures.gpu
    savings = ", or ".join(suggestion.as_overrides() for suggestion in figures.memory_savings)
    remedy = f"set {savings}" if savings else ""
    if config.hardware.world_size == 1:
        remedy = remedy or "use a smaller model or a larger GPU"
        value = str(config.training.batch_size)
        yield Problem("training.batch_size", value, describe_need(figures), remedy)
        return
    setting = config.hardware.sharding
    if setting == "ddp" and estimate_memory(config, "fsdp", gpu.spec).needed_bytes <= (
        gpu.memory_bytes or 0
    ):
        remedy = 'set hardware.sharding to "auto" or "fsdp"'
    remedy = remedy or "use more devices, a smaller model or a larger GPU"
    rule = f"{describe_need(figures)} (each of {config.hardware.world_size}, {figures.sharding})"
    yield Problem("hardware.sharding", setting, rule, remedy)


def describe_need(figures: Figures) -> str:
    """Return the memory that a device needs beside what the GPU has."""
    gpu = figures.gpu
    return f"needs {gib(figures.memory.needed_bytes)}; {gpu.name} has {gib(gpu.memory_bytes or 0)}"


def check_data(figures: Figures) -> Iterator[Problem]:
    if figures.starting:
        yield from missing_data(figures)
    tokens, training = figures.data.max_train_tokens, figures.config.training
    block = figures.config.model.block_size
    if tokens is None or tokens > training.batch_size * block:
        return
    rule = (
        f"makes batches of {training.batch_size} x {block:,} tokens, and the training data has at "
        f"most {tokens:,}"
    )
    if tokens <= block:
        remedy = f"use more text, or a model.block_size below {tokens}"
        yield Problem("model.block_size", str(block), rule, remedy)
    else:
        remedy = f"use more text, or a batch_size of at most {max(1, (tokens - 1) // block)}"
        yield Problem("training.batch_size", str(training.batch_size), rule, remedy)


def missing_data(figures: Figures) -> Iterator[Problem]:
    if figures.data.missing:
        sources, rule = ", ".join(figures.data.missing), "does not exist, or matches no file"
        remedy = f"put Parquet there, or give another path; paths are relative to {Path.cwd()}"
        yield Problem("data.source", sources, rule, remedy)


def check_files(figures: Figures) -> Iterator[Problem]:
    """Check `training.init_from` and the benchmarks' files; addresses would take a download."""
    if problem := check_init_from(figures.config):
        yield problem
    for key in ("hellaswag", "lambada"):
        path = getattr(figures.config.evaluation, key)
        if figures.starting and path and "://" not in path and not Path(path).is_file():
            remedy = "give the path of the benchmark's Parquet file, or remove the key"
            yield Problem(f"evaluation.{key}", path, "does not exist", remedy)


def check_init_from(config: RunConfig) -> Problem | None:
    """Check that the run can start from the weights of `training.init_from`."""
    path = config.training.init_from
    if not path:
        return None
    remedy = "give a folder made by overnight import-hf, or a checkpoint"
    if not (Path(path) / MODEL_FILE).is_file():
        return Problem("training.init_from", path, f"has no {MODEL_FILE}", remedy)
    try:
        theirs = load_model_section(Path(path)).model_dump()
    except CheckpointError as error:
        return Problem("training.init_from", path, error.problems[0].rule, remedy)
    ours = config.model.model_dump(exclude={"dropout"})  # not part of the weights
    differing = {key: theirs[key] for key in ours if theirs[key] != ours[key]}
    if not differing:
        return None
    rule = "is a model of another shape: " + ", ".join(
        f"{key} {value}, not {ours[key]} as in [model]" for key, value in differing.items()
    )
    settings = " ".join(f"--set model.{key}={value}" for key, value in differing.items())
    return Problem("training.init_from", path, rule, settings)


def check_disk(figures: Figures) -> Iterator[Problem]:
    root = figures.config.run.root
    try:
        ancestor, rule = existing_ancestor(root), ""
        if not ancestor.is_dir():
            rule = f"is impossible: {ancestor} is a file, not a folder"
        elif not os.access(ancestor, os.W_OK | os.X_OK):
            rule = f"is not writable: no permission to write to {ancestor}"
    except (OSError, ValueError) as error:
        rule = f"is not a possible folder: {error}"
    if rule:
        yield Problem("run.root", str(root), rule, "use a writable folder")
    total, free = sum(figures.disk.values()), figures.free_disk_bytes
    if free is not None and total > free:
        parts = ", ".join(f"{name} {gb(size)}" for name, size in figures.disk.items())
        rule = f"has {gb(free)} free; the run writes {gb(total)}: {parts}"
        remedy = "free space, lower training.checkpoints_kept, or change run.root"
        yield Problem("run.root", str(root), rule, remedy)
