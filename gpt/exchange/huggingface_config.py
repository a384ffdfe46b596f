"""Whether a GPT-2 of Hugging Face's is one that our network can be: its settings and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.config.rules import check_head_split
from gpt.config.schema import ModelSection
from gpt.errors import ExchangeError, Problem
from gpt.exchange.tokenizer_files import vocabulary

DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "resid_pdrop": 0.1,
}
"""What transformers' GPT2Config takes where config.json is silent."""
SIZES = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "block_size",
    "vocab_size": "vocab_size",
    "resid_pdrop": "dropout",
}
"""Their names and ours."""
POSSIBLE: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""What a setting may be; the first is what it is where config.json is silent, but for model_type,
which must be said."""
RETRAIN = "choose a GPT-2 that has it so: a model trained with another value computes otherwise"


def read_gpt2_config(directory: Path) -> ModelSection:
    """Raises `ExchangeError` with every setting that our network does not have."""
    path = directory / "config.json"
    try:
        raw: Any = json.loads(path.read_bytes())
    except OSError as error:
        remedy = "give a directory of transformers' save_pretrained"
        rule = f"cannot be read: {error.strerror}"
        raise ExchangeError(Problem(str(path), "", rule, remedy)) from error
    except ValueError as error:
        raise ExchangeError(Problem(str(path), "", f"is no JSON: {error}", "mend it")) from error
    if not isinstance(raw, dict) or raw.get("model_type") != "gpt2":
        found = raw.get("model_type") if isinstance(raw, dict) else None
        rule = "only GPT-2 can be brought in: model_type must be gpt2"
        remedy = "give the directory of a GPT2LMHeadModel"
        raise ExchangeError(Problem(f"{path}: model_type", str(found), rule, remedy))
    values = DEFAULTS | raw
    section, problems = _section(values)
    problems += _setting_problems(values) + _tokenizer_problems(directory)
    if problems or section is None:
        raise ExchangeError(*(_in_file(path, problem) for problem in problems))
    return section


def _section(values: Mapping[str, Any]) -> tuple[ModelSection | None, list[Problem]]:
    ours: dict[str, Any] = {"architecture": "gpt2", "bias": True}
    ours |= {our_name: values[name] for name, our_name in SIZES.items()}
    names = {our_name: name for name, our_name in SIZES.items()}
    try:
        section = ModelSection.model_validate_json(json.dumps(ours))
    except ValidationError as error:
        return None, [
            Problem(
                names[str(detail["loc"][0])],
                json.dumps(detail["input"]),
                detail["msg"][0].lower() + detail["msg"][1:],
                RETRAIN,
            )
            for detail in error.errors(include_url=False, include_context=False)
        ]
    known = {f"model.{key}": value for key, value in section.model_dump().items()}
    problem = check_head_split(known)
    return section, [problem] if problem else []


def _setting_problems(values: Mapping[str, Any]) -> list[Problem]:
    problems = [
        Problem(name, json.dumps(values[name]), f"must be {_choices(possible)}", RETRAIN)
        for name, possible in POSSIBLE.items()
        if name in values and values[name] not in possible
    ]
    n_inner, n_embd = values.get("n_inner"), values["n_embd"]
    if n_inner is not None and n_inner != 4 * n_embd:
        rule = f"must be null or 4 * n_embd = {4 * n_embd}"
        problems.append(Problem("n_inner", json.dumps(n_inner), rule, RETRAIN))
    for name in ("embd_pdrop", "attn_pdrop"):
        if values.get(name, DEFAULTS["resid_pdrop"]) != values["resid_pdrop"]:
            rule = f"must be resid_pdrop = {values['resid_pdrop']}: there is one dropout here"
            remedy = "make the three equal in config.json; they matter in training alone"
            problems.append(Problem(name, json.dumps(values.get(name, 0.1)), rule, remedy))
    return problems


def _choices(possible: tuple[Any, ...]) -> str:
    return " or ".join(json.dumps(value) for value in possible)


def _tokenizer_problems(directory: Path) -> list[Problem]:
    """Where a vocabulary lies beside the weights, it must be GPT-2's own: ids have no other
    meaning here."""
    path = directory / "vocab.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = None
    if found == vocabulary():
        return []
    rule = "must be GPT-2's own vocabulary, the only one here"
    return [Problem("vocab.json", "", rule, "choose a model with GPT-2's tokenizer")]


def _in_file(path: Path, problem: Problem) -> Problem:
    key = problem.key.removeprefix("model.")
    return Problem(f"{path}: {key}", problem.value, problem.rule, problem.remedy)
