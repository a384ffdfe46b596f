"""A model in a folder: `model.safetensors` and `config.json`, whose section `model` says what it
is. A checkpoint is such a folder, with more beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt.config import ModelSection
from gpt.errors import CheckpointError, Problem
from gpt.model.transformer import ARCHITECTURES, GPT

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def load_saved(folder: Path, device: torch.device) -> GPT:
    """The network on `device`, in its evaluation mode. Raises `CheckpointError`."""
    section = read_section(folder)
    tensors = read_tensors(folder, section)
    with torch.device("meta"):
        model = ARCHITECTURES[section.architecture](section)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval()


def read_section(folder: Path) -> ModelSection:
    """Raises `CheckpointError` where the file is missing or no config of ours."""
    path = folder / CONFIG_FILE
    try:
        raw: Any = json.loads(path.read_bytes())
        return ModelSection.model_validate_json(json.dumps(raw["model"]))
    except OSError as error:
        rule = f"cannot be read: {error.strerror}"
    except ValidationError as error:
        rule = f"is no config of ours: {error.error_count()} values of [model] are wrong"
    except (ValueError, KeyError, TypeError):
        rule = "is no config of ours: it has no section model"
    raise CheckpointError(Problem(str(path), "", rule, _REMEDY))


def read_tensors(folder: Path, section: ModelSection) -> dict[str, Tensor]:
    """By our names, on the CPU. Raises `CheckpointError` where they are not those of `section`."""
    path = folder / MODEL_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        rule = f"cannot be read: {str(error).splitlines()[0]}"
        raise CheckpointError(Problem(str(path), "", rule, _REMEDY)) from error
    wrong = differing(shapes(section), {name: tensor.shape for name, tensor in tensors.items()})
    if wrong:
        rule = "the tensors are not those of the config beside them"
        raise CheckpointError(Problem(str(path), wrong, rule, _REMEDY))
    return tensors


_REMEDY = "give a checkpoint's folder, or another with model.safetensors and config.json of ours"


def write_saved(folder: Path, section: ModelSection, tensors: Mapping[str, Tensor]) -> None:
    """Both files, into a folder that is there."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / MODEL_FILE)
    text = json.dumps({"model": section.model_dump(mode="json")}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def shapes(section: ModelSection) -> dict[str, torch.Size]:
    """Of every tensor of the network, by name."""
    with torch.device("meta"):
        model = ARCHITECTURES[section.architecture](section)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def differing(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str:
    """The first name that is missing, unknown or of another shape, in words; empty where all
    agree."""
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            return f"{name}: {_shape(found.get(name))}, not {_shape(expected.get(name))}"
    return ""


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
