"""A model read from its folder (`gpt.model.section`) and written there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt.config.schema import ModelSection
from gpt.errors import CheckpointError, Problem
from gpt.model.architectures import ARCHITECTURES
from gpt.model.base import GPT
from gpt.model.section import CONFIG_FILE, MODEL_FILE, REMEDY, load_model_section


def load_model(folder: Path, device: torch.device) -> GPT:
    """The network on `device`, in its evaluation mode. Raises `CheckpointError`."""
    section = load_model_section(folder)
    tensors = load_tensors(folder, section)
    with torch.device("meta"):
        model = ARCHITECTURES[section.architecture](section)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval()


def load_tensors(folder: Path, section: ModelSection) -> dict[str, Tensor]:
    """By our names, on the CPU. Raises `CheckpointError` where they are not those of `section`."""
    path = folder / MODEL_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        rule = f"cannot be read: {str(error).splitlines()[0]}"
        raise CheckpointError(Problem(str(path), "", rule, REMEDY)) from error
    wrong = find_shape_mismatch(
        tensor_shapes(section), {name: tensor.shape for name, tensor in tensors.items()}
    )
    if wrong:
        rule = "the tensors are not those of the config beside them"
        raise CheckpointError(Problem(str(path), wrong, rule, REMEDY))
    return tensors


def save_model(folder: Path, section: ModelSection, tensors: Mapping[str, Tensor]) -> None:
    """Both files, into a folder that is there."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / MODEL_FILE)
    text = json.dumps({"model": section.model_dump(mode="json")}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def tensor_shapes(section: ModelSection) -> dict[str, torch.Size]:
    """Of every tensor of the network, by name."""
    with torch.device("meta"):
        model = ARCHITECTURES[section.architecture](section)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def find_shape_mismatch(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str:
    """The first name that is missing, unknown or of another shape, in words; empty where all
    agree."""
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            return f"{name}: {_shape(found.get(name))}, not {_shape(expected.get(name))}"
    return ""


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
