"""Models to and from the folders of Hugging Face's transformers (5 or newer), which is not needed
for it: `gpt2` is `GPT2LMHeadModel`, `nanochat` is `NanoChatForCausalLM`.

Their logits are those of our network. GPT-2 there always has biases: without ours they are zero.
Its matrices are Conv1D's, which are the transposes of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt.config.schema import ModelSection
from gpt.data.tokenize.tokenizer import END_OF_TEXT, VOCAB_SIZE
from gpt.errors import ExchangeError, Problem
from gpt.exchange.huggingface_config import read_gpt2_config
from gpt.exchange.model_card import ModelCardData, model_card
from gpt.exchange.tokenizer_files import write_tokenizer
from gpt.files import atomic_folder
from gpt.model.io import find_shape_mismatch, load_tensors, save_model, tensor_shapes
from gpt.model.nanochat import LOGIT_SOFTCAP, NORM_EPSILON, ROTARY_BASE
from gpt.model.section import load_model_section

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


# --- out -----------------------------------------------------------------------------------------


def export_huggingface(folder: Path, directory: Path, facts: ModelCardData) -> None:
    """Write the model in `folder` (a checkpoint's, or another with `model.safetensors` and
    `config.json`) to a new `directory` that `AutoModelForCausalLM` and `AutoTokenizer` load, with
    a model card of what `facts` knows.

    Written under another name, then renamed. Raises `CheckpointError` for a folder that holds no
    model of ours, `ExchangeError` where the directory is there or cannot be written.
    """
    section = load_model_section(folder)
    tensors = load_tensors(folder, section)
    their_tensors = _OUT[section.architecture](section, tensors)
    with _told(directory), atomic_folder(directory) as writing:
        save_file(their_tensors, writing / WEIGHTS, metadata={"format": "pt"})
        _write_json(writing / "config.json", _CONFIGS[section.architecture](section))
        _write_json(writing / "generation_config.json", _generation_config(section))
        write_tokenizer(writing, section.block_size)
        card = model_card(section, facts)
        (writing / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _gpt2_config(section: ModelSection) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": section.vocab_size,
        "n_positions": section.block_size,
        "n_embd": section.n_embd,
        "n_layer": section.n_layer,
        "n_head": section.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": section.dropout,
        "embd_pdrop": section.dropout,
        "attn_pdrop": section.dropout,
        "tie_word_embeddings": True,
        **_COMMON,
    }


def _nanochat_config(section: ModelSection) -> dict[str, Any]:
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": section.vocab_size,
        "hidden_size": section.n_embd,
        "intermediate_size": 4 * section.n_embd,
        "num_hidden_layers": section.n_layer,
        "num_attention_heads": section.n_head,
        "num_key_value_heads": section.n_head,
        "max_position_embeddings": section.block_size,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": section.dropout,
        "rms_norm_eps": NORM_EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        "final_logit_softcapping": LOGIT_SOFTCAP,
        "tie_word_embeddings": False,
        # Unless told otherwise it pads with id 1, a token like others here.
        "pad_token_id": None,
        **_COMMON,
    }


_COMMON = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "dtype": "float32"}


def _generation_config(section: ModelSection) -> dict[str, Any]:
    values: dict[str, Any] = {
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
    }
    padding = list(range(VOCAB_SIZE, section.vocab_size))
    # Rows past the vocabulary stand for nothing: stock generation must not draw them either.
    return values | ({"suppress_tokens": padding} if padding else {})


def _gpt2_out(section: ModelSection, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with_biases = tensor_shapes(section.model_copy(update={"bias": True}))
    return {
        f"transformer.{name}": _flipped(name, tensors[name])
        if name in tensors
        else torch.zeros(shape)
        for name, shape in with_biases.items()
    }


def _nanochat_out(_: ModelSection, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name if name.startswith("lm_head.") else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }


def _flipped(name: str, tensor: Tensor) -> Tensor:
    """Between Conv1D's (in, out) and Linear's (out, in); other tensors stay."""
    is_conv1d = name.endswith(".weight") and (".attn.c_" in name or ".mlp.c_" in name)
    return tensor.T.contiguous() if is_conv1d else tensor


_OUT = {"gpt2": _gpt2_out, "nanochat": _nanochat_out}
_CONFIGS = {"gpt2": _gpt2_config, "nanochat": _nanochat_config}


# --- in ------------------------------------------------------------------------------------------


def import_huggingface(directory: Path, folder: Path) -> ModelSection:
    """Write the GPT-2 in a `directory` of transformers as a new `folder` with our
    `model.safetensors` and `config.json`, in float32.

    Raises `ExchangeError` with every setting that our network does not have, for weights that are
    missing, pickled or of other shapes, and where the folder is there or cannot be written.
    """
    section = read_gpt2_config(directory)
    tensors = _gpt2_in(directory, section)
    with _told(folder), atomic_folder(folder) as writing:
        save_model(writing, section, tensors)
    return section


def _gpt2_in(directory: Path, section: ModelSection) -> dict[str, Tensor]:
    theirs = {name.removeprefix("transformer."): t for name, t in _read_weights(directory).items()}
    # Older files keep the causal mask as a tensor, and the tied head twice.
    head = theirs.pop("lm_head.weight", None)
    tensors = {
        name: _flipped(name, tensor).float()
        for name, tensor in theirs.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    wrong = find_shape_mismatch(
        tensor_shapes(section), {name: tensor.shape for name, tensor in tensors.items()}
    )
    if not wrong and head is not None and not torch.equal(head, theirs["wte.weight"]):
        wrong = "lm_head.weight: its own, not wte.weight"
    if wrong:
        rule = "the tensors must be those of a GPT2LMHeadModel of the config beside them"
        remedy = "save it with save_pretrained from GPT2LMHeadModel"
        raise ExchangeError(Problem(str(directory), wrong, rule, remedy))
    return tensors


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """Of one file, or of all that an index names."""
    files = [WEIGHTS]
    try:
        if (directory / INDEX).is_file():
            files = sorted(set(json.loads((directory / INDEX).read_bytes())["weight_map"].values()))
        return {name: t for file in files for name, t in load_file(directory / file).items()}
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        rule = f"its weights cannot be read: {(str(error).splitlines() or ['unreadable'])[0]}"
    remedy = "give a directory with model.safetensors; nothing pickled (pytorch_model.bin) is read"
    raise ExchangeError(Problem(str(directory), "", rule, remedy))


# --- both ----------------------------------------------------------------------------------------


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the disk refuses, as an error for the user."""
    try:
        yield
    except FileExistsError as error:
        remedy = "name a new directory, or remove this one"
        raise ExchangeError(Problem(str(path), "", "is there already", remedy)) from error
    except (OSError, SafetensorError) as error:
        rule = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise ExchangeError(Problem(str(path), "", rule, "name a place with room")) from error
