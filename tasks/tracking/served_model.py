"""The model that MLflow serves: prompts in, continuations out.

MLflow copies this file beside `model.safetensors` and `config.json` and runs it from there (models
from code), with a copy of the package `gpt` in `code/`; nothing is pickled. A wrong request is
answered with 400 and the messages of the command line.
"""

from __future__ import annotations

from collections.abc import Iterator
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
EXAMPLE = '{"prompt": "Once upon a time", "max_tokens": 64}'


class ServedModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        self._model = load_model(Path(__file__).parent, pick_device("auto"))

    def predict(
        self,
        context: Any,
        # MLflow warns of any other annotation; a request may also arrive as dict, list or array.
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        try:
            prompts = read_prompts(model_input)
            sampling = SamplingParams(**(params or {}))
        except GenerationError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return [generate(self._model, prompt, sampling) for prompt in prompts]


def read_prompts(request: Any) -> list[str]:
    """Return the prompts of a request in any of MLflow's formats.

    Raises `GenerationError` if there is none, if one is not text, and for every other column, such
    as a misspelled parameter.
    """
    columns = {str(name): _to_list(values) for name, values in _to_columns(request).items()}
    problems = list(_check_columns(columns))
    if problems:
        raise GenerationError(*problems)
    return columns[PROMPT]


def _check_columns(columns: dict[str, list[Any]]) -> Iterator[Problem]:
    remedy = f"send a request such as {EXAMPLE}"
    if PROMPT not in columns:
        given = ", ".join(columns) or "nothing"
        yield Problem(PROMPT, "", f"missing from the request, which has: {given}", remedy)
    for name, values in columns.items():
        if name != PROMPT:
            rule = f"neither the prompt nor a parameter ({', '.join(PARAMETERS)})"
            yield Problem(name, "", rule, remedy)
            continue
        for value in values:
            if not isinstance(value, str):
                yield Problem(PROMPT, repr(value), "must be text", remedy)


def _to_columns(request: Any) -> dict[Any, Any]:
    """MLflow passes on a table, a dict of columns, a list of rows, or the prompts alone."""
    if isinstance(request, list) and all(isinstance(row, dict) for row in request):
        request = pd.DataFrame(request)
    if isinstance(request, pd.DataFrame):
        return {name: request[name] for name in request}
    return request if isinstance(request, dict) else {PROMPT: request}


def _to_list(values: Any) -> list[Any]:
    values = values.tolist() if hasattr(values, "tolist") else values
    return values if isinstance(values, list) else [values]


set_model(ServedModel())
