"""transformers' `config.json` and `generation_config.json`, written and read."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.config.rules import check_head_split
from gpt.config.schema import ModelSection
from gpt.data.tokenize.tokenizer import END_OF_TEXT, VOCAB_SIZE
from gpt.errors import ExchangeError, Problem
from gpt.exchange.huggingface_tokenizer import find_tokenizer_problem
from gpt.model.nanochat import LOGIT_SOFTCAP, NORM_EPSILON, ROTARY_BASE

GPT2_SETTINGS: dict[str, tuple[str, Any]] = {
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "n_positions": ("block_size", 1024),
    "vocab_size": ("vocab_size", 50257),
    "resid_pdrop": ("dropout", 0.1),
}
"""transformers' name -> ours, and GPT2Config's default for a key missing from config.json."""
GPT2_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""Supported values. The first is exported, and is GPT2Config's default."""
UNSUPPORTED_REMEDY = "choose another GPT-2: a model trained with this value computes differently"


def write_configs(folder: Path, section: ModelSection) -> None:
    """Write `config.json` and `generation_config.json` for a model."""
    tokens = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    architecture = _gpt2_config if section.architecture == "gpt2" else _nanochat_config
    config = architecture(section) | tokens | {"dtype": "float32"}
    generation: dict[str, Any] = tokens | {"pad_token_id": END_OF_TEXT}
    if padding := list(range(VOCAB_SIZE, section.vocab_size)):
        generation["suppress_tokens"] = padding  # rows beyond the vocabulary are not tokens
    for name, values in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _gpt2_config(section: ModelSection) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(section, ours) for theirs, (ours, _) in GPT2_SETTINGS.items()},
        "n_inner": None,
        "embd_pdrop": section.dropout,
        "attn_pdrop": section.dropout,
        **{name: supported[0] for name, supported in GPT2_SUPPORTED.items()},
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
        "pad_token_id": None,  # the default is 1, an ordinary token here
    }


def read_gpt2_config(directory: Path) -> ModelSection:
    """Read the `config.json` of a GPT-2, and check the tokenizer beside it.

    Raises `ExchangeError` for every setting that this GPT-2 does not support.
    """
    path = directory / "config.json"
    try:
        raw: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        rule = f"cannot be read: {getattr(error, 'strerror', error)}"
        remedy = "use a directory written by save_pretrained"
        raise ExchangeError(Problem(str(path), "", rule, remedy)) from error
    found = raw.get("model_type") if isinstance(raw, dict) else None
    if found != "gpt2":
        rule, remedy = "only gpt2 can be imported", "use the directory of a GPT2LMHeadModel"
        raise ExchangeError(Problem(f"{path}: model_type", str(found), rule, remedy))
    values = {name: default for name, (_, default) in GPT2_SETTINGS.items()} | raw
    section, problems = _parse_section(values)
    problems += _find_unsupported(values)
    if tokenizer_problem := find_tokenizer_problem(directory):
        problems.append(tokenizer_problem)
    if problems or section is None:
        raise ExchangeError(
            *(replace(p, key=f"{path}: {p.key.removeprefix('model.')}") for p in problems)
        )
    return section


def _parse_section(values: Mapping[str, Any]) -> tuple[ModelSection | None, list[Problem]]:
    names = {ours: theirs for theirs, (ours, _) in GPT2_SETTINGS.items()}
    model = {"architecture": "gpt2", "bias": True} | {k: values[v] for k, v in names.items()}
    try:
        section = ModelSection.model_validate_json(json.dumps(model))
    except ValidationError as error:
        return None, [
            Problem(
                names[str(detail["loc"][0])],
                json.dumps(detail["input"]),
                detail["msg"][0].lower() + detail["msg"][1:],
                UNSUPPORTED_REMEDY,
            )
            for detail in error.errors(include_url=False, include_context=False)
        ]
    problem = check_head_split(section.n_embd, section.n_head, section.architecture)
    return section, [problem] if problem else []


def _find_unsupported(values: Mapping[str, Any]) -> list[Problem]:
    def problem(name: str, rule: str, remedy: str = UNSUPPORTED_REMEDY) -> Problem:
        return Problem(name, json.dumps(values[name]), rule, remedy)

    problems = [
        problem(name, f"must be {' or '.join(map(json.dumps, supported))}")
        for name, supported in GPT2_SUPPORTED.items()
        if name in values and values[name] not in supported
    ]
    if values.get("n_inner") not in (None, 4 * values["n_embd"]):
        problems.append(problem("n_inner", f"must be null or 4 * n_embd = {4 * values['n_embd']}"))
    values = {"embd_pdrop": 0.1, "attn_pdrop": 0.1} | dict(values)
    for name in ("embd_pdrop", "attn_pdrop"):
        if values[name] != values["resid_pdrop"]:
            rule = f"must equal resid_pdrop = {values['resid_pdrop']}: there is one dropout rate"
            remedy = "set all three to the same value in config.json; only training uses them"
            problems.append(problem(name, rule, remedy))
    return problems
