"""The model that MLflow serves: prompts in, what follows them out.

MLflow copies this file beside `model.safetensors` and `config.json` and runs it from there (models
from code), with the package `gpt` of the day in `code/`: nothing is pickled. What was asked wrongly
is answered with 400 and the same words as on the command line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model

from gpt.errors import GenerationError, Problem
from gpt.hardware.device import pick_device
from gpt.model.generate import SamplingParams, generate
from gpt.model.io import load_model

PROMPT = "prompt"
PARAMETERS = tuple(field.name for field in fields(SamplingParams))
EXAMPLE = '{"inputs": {"prompt": ["Once upon a time"]}, "params": {"max_tokens": 64}}'


class ServedModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        self._network = load_model(Path(__file__).parent, pick_device("auto"))
        _check_requests()

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        # MLflow takes a mapping to a list of texts, which Python may give it, for a single row.
        prompts = [prompt for row in model_input[PROMPT] for prompt in _listed(row)]
        try:
            _refuse(problem for prompt in prompts if (problem := _not_text(prompt)))
            sampling = _sampling(params or {})
        except GenerationError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return [generate(self._network, prompt, sampling) for prompt in prompts]


def _sampling(params: Mapping[str, Any]) -> SamplingParams:
    """Raises `GenerationError`, also for a parameter that there is not."""
    remedy = f"leave it out, or give one of: {', '.join(PARAMETERS)}"
    _refuse(
        Problem(f"params.{name}", repr(value), "there is no such parameter", remedy)
        for name, value in params.items()
        if name not in PARAMETERS
    )
    return SamplingParams(**params)


def _not_text(prompt: object) -> Problem | None:
    if isinstance(prompt, str):
        return None
    return Problem(PROMPT, repr(prompt), "must be text", f"ask as {EXAMPLE}")


def _refuse(problems: Iterator[Problem]) -> None:
    if found := tuple(problems):
        raise GenerationError(*found)


# --- the request, before MLflow has altered it ---------------------------------------------------


def _check_requests() -> None:
    """Look at each request first. MLflow drops a parameter or a column that it does not know
    without a word to who asked, and offers a model no place to look at them itself."""
    validate = getattr(mlflow.pyfunc, "_validate_prediction_input", None)
    if validate and not hasattr(validate, "__wrapped__"):
        mlflow.pyfunc._validate_prediction_input = _checking_first(validate)


def _checking_first(validate: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(validate)
    def checked(
        data: Any, params: Any, input_schema: Any, params_schema: Any, *rest: Any, **named: Any
    ) -> Any:
        try:
            _check(data, params)
        except GenerationError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return validate(data, params, input_schema, params_schema, *rest, **named)

    return checked


def _check(data: Any, params: Any) -> None:
    columns = _columns(data)
    if PROMPT not in columns:
        given = ", ".join(columns) or "nothing"
        rule = f"is missing; given was: {given}"
        raise GenerationError(Problem(PROMPT, "", rule, f"ask as {EXAMPLE}"))
    _refuse(
        Problem(name, "", "is neither the prompt nor a parameter", f"ask as {EXAMPLE}")
        for name in columns
        if name != PROMPT
    )
    _refuse(problem for prompt in columns[PROMPT] if (problem := _not_text(prompt)))
    if params is not None and not isinstance(params, dict):
        rule = "must be an object of names and values"
        raise GenerationError(Problem("params", repr(params), rule, f"ask as {EXAMPLE}"))
    _sampling(params or {})


def _columns(data: Any) -> dict[str, list[Any]]:
    """Of what MLflow makes of a request's body: a table, arrays by name, or rows."""
    if isinstance(data, list) and all(isinstance(row, dict) for row in data):
        data = pd.DataFrame(data)
    if not isinstance(data, pd.DataFrame | dict):
        data = {PROMPT: data}
    return {str(name): _listed(data[name]) for name in data}


def _listed(values: Any) -> list[Any]:
    listed = values.tolist() if hasattr(values, "tolist") else values
    return listed if isinstance(listed, list) else [listed]


set_model(ServedModel())
