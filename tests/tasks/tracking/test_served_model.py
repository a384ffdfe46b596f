"""`mlflow models serve` on a registered model: continuations for prompts, 400 for mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from registry_data import finished_run, report
from waiting import free_port, scaled

from flows.cli.model_choice import find_model
from gpt.model.generate import SamplingParams, generate
from gpt.model.io import load_model
from tasks.tracking.runs import register_last_model

pytestmark = pytest.mark.slow

START_SECONDS = scaled(30)
NAME = "served"
SETTINGS = {"max_tokens": 8, "seed": 3}


@pytest.fixture(scope="module")
def model(tiny_root):
    """The folder of a registered model."""
    assert register_last_model(finished_run(tiny_root, report()).run, NAME)
    return find_model(f"models:/{NAME}@champion", tiny_root)


@pytest.fixture(scope="module")
def address(model, tiny_root, tmp_path_factory):
    """The address of a server that has our code only from the model's folder."""
    port, folder = free_port(), tmp_path_factory.mktemp("served")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tiny_root}/mlflow/mlflow.db",
    }
    words = ("models", "serve", "--env-manager", "local", "-m", f"models:/{NAME}@champion")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + START_SECONDS
        while not answers(url):
            assert time.monotonic() < end, (folder / "log").read_text()
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"{url}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ping", timeout=5):
            return True
    except OSError:
        return False


def ask(address: str, content: object) -> tuple[int, str]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=scaled(30)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_continuations_are_those_of_the_command_line(address, model):
    network = load_model(model, torch.device("cpu"))
    prompts = ["The", "Once upon a time"]
    texts = [generate(network, prompt, SamplingParams(**SETTINGS)) for prompt in prompts]
    assert texts[0] != texts[1]
    for request in (
        {"inputs": {"prompt": prompts}},
        {"inputs": prompts},
        {"instances": [{"prompt": prompt} for prompt in prompts]},
        {"dataframe_records": [{"prompt": prompt} for prompt in prompts]},
        {"dataframe_split": {"columns": ["prompt"], "data": [[p] for p in prompts]}},
    ):
        status, answer = ask(address, request | {"params": SETTINGS})
        assert (status, json.loads(answer)) == (200, {"predictions": texts}), request
    for prompt, expected in (("The", texts[:1]), (prompts, texts)):
        status, answer = ask(address, {"prompt": prompt} | SETTINGS)
        assert (status, json.loads(answer)) == (200, expected)


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        ({"max_tokens": "ten"}, ("max_tokens", "convert `<class 'str'>` to `DataType.long`")),
        ({"max_tokens": True}, ("max_tokens", "convert `<class 'bool'>` to `DataType.long`")),
        ({"max_tokens": 2.5}, ("max_tokens", "convert `<class 'float'>` to `DataType.long`")),
        ({"top_k": None}, ("top_k = None", "must be an integer", "e.g. 50")),
        ({"temperature": -1}, ("temperature = -1", "at least 0", "e.g. 0.8")),
        ({"top_p": 0}, ("top_p = 0", "must be above 0", "e.g. 0.95")),
        ({"seed": 2**63}, ("seed = 9223372036854775808", "2^63 - 1", "1337")),
        ({"top_p": 2, "top_k": -1}, ("2 problems", "top_p = 2", "top_k = -1")),
    ],
)
@pytest.mark.parametrize("is_flat", [True, False], ids=["flat", "params"])
def test_wrong_parameters_are_refused(address, params, parts, is_flat):
    nested = {"inputs": {"prompt": ["The"]}, "params": params}
    status, answer = ask(address, {"prompt": "The"} | params if is_flat else nested)
    assert status == 400
    for part in parts:
        assert part in json.loads(answer)["message"]
    assert "Traceback" not in answer


@pytest.mark.parametrize(
    ("request_body", "part"),
    [
        ({"inputs": {"text": ["The"]}}, "prompt\n    missing from the request, which has: text"),
        ({"inputs": {"prompt": ["The"], "max_token": [3]}}, "max_token\n    neither the prompt"),
        ({"prompt": "The", "max_token": 3}, "max_token\n    neither the prompt nor a parameter"),
        ({"prompt": "The", "maxtokens": 5}, "(max_tokens, temperature, top_k, top_p, seed)"),
        ({"inputs": ["The"], "params": [1]}, "must be a dictionary"),
        ({"dataframe_records": [{"prompt": 5}]}, "prompt = 5\n    must be text"),
        ({"dataframe_records": [{"prompt": None}]}, "must be text"),
        ({"inputs": {"prompt": [["The"]]}}, "prompt"),
        ({"inputs": [{"prompt": "The", "top": 3}]}, "top\n    neither the prompt"),
        ({"prompt": 5}, "prompt = 5\n    must be text"),
        ({"prompt": {"text": "The"}}, "prompt"),
        ({}, "exactly one of the input fields"),
        (b"{", "valid JSON"),
        ([], "JSON dictionary"),
    ],
)
def test_wrong_requests_are_refused(address, request_body, part):
    status, answer = ask(address, request_body)
    assert status == 400, answer
    assert part in json.loads(answer)["message"]
    assert "Traceback" not in answer
