"""Loading a model from its folder (`gpt.model.section`) and saving it there."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt.config.schema import ModelSection
from gpt.errors import CheckpointError, Problem, first_line
from gpt.model.architectures import ARCHITECTURES
from gpt.model.base import GPT
from gpt.model.section import CONFIG_FILE, MODEL_FILE, MODEL_FOLDER_REMEDY, load_model_section


def load_model(folder: Path, device: torch.device | str = "cpu") -> GPT:
    """Load the network of a checkpoint or model folder onto `device`, in evaluation mode.

    Raises `CheckpointError` if a file is missing, damaged or does not fit the config.
    """
    section = load_model_section(folder)
    tensors = load_tensors(folder, section)
    model = _build_on_meta(section)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).eval()


def load_tensors(folder: Path, section: ModelSection) -> dict[str, Tensor]:
    """Load the parameters by name, on the CPU.

    Raises `CheckpointError` if the file cannot be read or its names and shapes are not those of
    the network that `section` describes.
    """
    path = folder / MODEL_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        rule = f"cannot be read: {first_line(error)}"
        raise CheckpointError(Problem(str(path), "", rule, MODEL_FOLDER_REMEDY)) from error
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if mismatch := find_shape_mismatch(tensor_shapes(section), found):
        rule = f"does not hold the tensors that {CONFIG_FILE} beside it describes"
        raise CheckpointError(Problem(str(path), mismatch, rule, MODEL_FOLDER_REMEDY))
    return tensors


def save_model(folder: Path, section: ModelSection, tensors: Mapping[str, Tensor]) -> None:
    """Write the parameters and the config into an existing folder."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / MODEL_FILE)
    text = json.dumps({"model": section.model_dump(mode="json")}, indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def tensor_shapes(section: ModelSection) -> dict[str, torch.Size]:
    """Return the shape of every tensor of the network, by name, without allocating any."""
    return {name: tensor.shape for name, tensor in _build_on_meta(section).state_dict().items()}


def find_shape_mismatch(expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]) -> str:
    """Describe the first missing, unknown or differently shaped tensor; "" if there is none."""
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            return f"{name}: {_format(found.get(name))}, expected {_format(expected.get(name))}"
    return ""


def _build_on_meta(section: ModelSection) -> GPT:
    with torch.device("meta"):
        return ARCHITECTURES[section.architecture](section)


def _format(shape: torch.Size | None) -> str:
    return "missing" if shape is None else " x ".join(map(str, shape))
