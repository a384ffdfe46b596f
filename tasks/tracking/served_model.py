"""The model that MLflow serves: prompts in, continuations out.

MLflow copies this file beside `model.safetensors` and `config.json` and runs it from there (models
from code), with a copy of the package `gpt` in `code/`; nothing is pickled. A wrong request is
answered with 400 and the messages of the command line.
"""

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
    """Return the prompts of a request in any of MLflow's formats: a table, a dict of columns, a
    list of rows, or the prompts alone.

    Raises `GenerationError` if there is none, if one is not text, and for every other column, such
    as a misspelled parameter.
    """
    if isinstance(request, list) and all(isinstance(row, dict) for row in request):
        request = pd.DataFrame(request)
    if isinstance(request, pd.DataFrame):
        request = request.to_dict("list")
    columns = request if isinstance(request, dict) else {PROMPT: request}
    prompts = columns.get(PROMPT, [])
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    prompts = prompts if isinstance(prompts, list) else [prompts]
    remedy, parameters = f"send a request such as {EXAMPLE}", ", ".join(PARAMETERS)
    problems = [
        Problem(str(name), "", f"neither the prompt nor a parameter ({parameters})", remedy)
        for name in columns
        if name != PROMPT
    ]
    problems += [
        Problem(PROMPT, repr(prompt), "must be text", remedy)
        for prompt in prompts
        if not isinstance(prompt, str)
    ]
    if PROMPT not in columns:
        given = ", ".join(map(str, columns)) or "nothing"
        rule = f"missing from the request, which has: {given}"
        problems.insert(0, Problem(PROMPT, "", rule, remedy))
    if problems:
        raise GenerationError(*problems)
    return prompts


set_model(ServedModel())
