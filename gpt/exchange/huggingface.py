"""Export to and import from Hugging Face transformers (version 5 or newer).

transformers is not needed for it. `gpt2` is exported as `GPT2LMHeadModel`, `nanochat` as
`NanoChatForCausalLM`; their logits equal ours. GPT2LMHeadModel always has biases, so missing ones
are exported as zeros, and its Conv1D matrices are the transposes of ours.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt.config.schema import ModelSection
from gpt.errors import ExchangeError, Problem, first_line
from gpt.exchange.huggingface_config import read_gpt2_config, write_configs
from gpt.exchange.huggingface_tokenizer import write_tokenizer
from gpt.exchange.model_card import ModelCardData, build_model_card
from gpt.files import atomic_folder
from gpt.model.io import find_shape_mismatch, load_tensors, save_model, tensor_shapes
from gpt.model.section import load_model_section

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def export_huggingface(folder: Path, directory: Path, card_data: ModelCardData) -> None:
    """Export the model in `folder`, e.g. a checkpoint, with tokenizer and model card.

    Creates `directory` atomically; `AutoModelForCausalLM` and `AutoTokenizer` load it. Raises
    `CheckpointError` if `folder` has no valid model, and `ExchangeError` if `directory` exists or
    cannot be written.
    """
    section = load_model_section(folder)
    renamed = _rename_tensors(section, load_tensors(folder, section))
    with _explain_write_errors(directory), atomic_folder(directory) as partial:
        save_file(renamed, partial / WEIGHTS, metadata={"format": "pt"})
        write_configs(partial, section)
        write_tokenizer(partial, section.block_size)
        card = build_model_card(section, card_data)
        (partial / "README.md").write_text(card, encoding="utf-8")


def _rename_tensors(section: ModelSection, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if section.architecture == "nanochat":
        return {
            name if name.startswith("lm_head.") else f"model.{name}": tensor
            for name, tensor in tensors.items()
        }
    with_biases = tensor_shapes(section.model_copy(update={"bias": True}))
    return {
        f"transformer.{name}": _transpose_conv1d(name, tensors[name])
        if name in tensors
        else torch.zeros(shape)
        for name, shape in with_biases.items()
    }


def _transpose_conv1d(name: str, tensor: Tensor) -> Tensor:
    """Convert between Conv1D's (in, out) and Linear's (out, in); other tensors are unchanged."""
    is_conv1d = name.endswith(".weight") and (".attn.c_" in name or ".mlp.c_" in name)
    return tensor.T.contiguous() if is_conv1d else tensor


def import_huggingface(directory: Path, folder: Path) -> ModelSection:
    """Import a transformers GPT-2 as a new model folder, in float32.

    Raises `ExchangeError` for every setting that this GPT-2 does not support; for weights that are
    missing, pickled or of the wrong shape; and if `folder` exists or cannot be written.
    """
    section = read_gpt2_config(directory)
    tensors = _load_gpt2(directory, section)
    with _explain_write_errors(folder), atomic_folder(folder) as partial:
        save_model(partial, section, tensors)
    return section


def _load_gpt2(directory: Path, section: ModelSection) -> dict[str, Tensor]:
    weights = {name.removeprefix("transformer."): t for name, t in _load(directory).items()}
    # Older files also store the causal mask and a second copy of the tied head.
    head = weights.pop("lm_head.weight", None)
    tensors = {
        name: _transpose_conv1d(name, tensor).float()
        for name, tensor in weights.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    found = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = find_shape_mismatch(tensor_shapes(section), found)
    if not wrong and head is not None and not torch.equal(head, weights["wte.weight"]):
        wrong = "lm_head.weight differs from wte.weight"
    if wrong:
        rule = "the tensors do not match a GPT2LMHeadModel with this config.json"
        remedy = "save it with GPT2LMHeadModel.save_pretrained"
        raise ExchangeError(Problem(str(directory), wrong, rule, remedy))
    return tensors


def _load(directory: Path) -> dict[str, Tensor]:
    """Load one weights file, or all files of an index."""
    files = [WEIGHTS]
    try:
        if (directory / INDEX).is_file():
            files = sorted(set(json.loads((directory / INDEX).read_bytes())["weight_map"].values()))
        return {name: t for file in files for name, t in load_file(directory / file).items()}
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        rule = f"the weights cannot be read: {first_line(error)}"
        remedy = "use a directory with model.safetensors; pickled weights (*.bin) are not loaded"
        raise ExchangeError(Problem(str(directory), "", rule, remedy)) from error


@contextmanager
def _explain_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        remedy = "choose a new directory, or delete this one"
        raise ExchangeError(Problem(str(path), "", "already exists", remedy)) from error
    except (OSError, SafetensorError) as error:
        rule = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise ExchangeError(Problem(str(path), "", rule, "choose a disk with room")) from error
