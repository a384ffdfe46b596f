"""Files that a config names beside its data: a model to begin with, benchmarks."""

from __future__ import annotations

from pathlib import Path

from gpt.config.schema import RunConfig
from gpt.errors import CheckpointError, Problem
from gpt.model.section import MODEL_FILE, load_model_section

FREE_OF_THE_WEIGHTS = {"dropout"}


def check_init_from(config: RunConfig) -> Problem | None:
    """What keeps the run from beginning with `training.init_from`."""
    named = config.training.init_from
    if not named:
        return None
    folder = Path(named)
    remedy = "give a folder that overnight import-hf made, or a checkpoint's"
    if not (folder / MODEL_FILE).is_file():
        return Problem("training.init_from", named, f"there is no {MODEL_FILE} in it", remedy)
    try:
        theirs = load_model_section(folder).model_dump()
    except CheckpointError as error:
        return Problem("training.init_from", named, error.problems[0].rule, remedy)
    ours = config.model.model_dump()
    differing = {k: v for k, v in theirs.items() if ours[k] != v and k not in FREE_OF_THE_WEIGHTS}
    if not differing:
        return None
    rule = "is a model of another shape: " + ", ".join(
        f"{key} {value} where [model] has {ours[key]}" for key, value in differing.items()
    )
    settings = " ".join(f"--set model.{key}={value}" for key, value in differing.items())
    return Problem("training.init_from", named, rule, settings)


def check_benchmark_files(config: RunConfig) -> Problem | None:
    """A benchmark's file that is not there; an address is not asked for."""
    for key in ("hellaswag", "lambada"):
        path = getattr(config.evaluation, key)
        if path and "://" not in path and not Path(path).is_file():
            return Problem(
                f"evaluation.{key}",
                path,
                "there is no such file",
                "give the path of the benchmark's Parquet, or leave the key out",
            )
    return None
