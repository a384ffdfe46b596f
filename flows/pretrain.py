"""The main flow: validate -> tokenize -> train -> evaluate, each a Prefect task."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from textwrap import indent
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from flows.environment import prefect_home
from gpt.artifacts import Artifact, EvaluationReport
from gpt.config import RunConfig, merged, read_toml
from gpt.errors import GPTError
from gpt.training.run_folder import open_run_folder
from tasks.evaluate import evaluate
from tasks.tokenize_parquet import tokenize_parquet
from tasks.tracking import RunRef, ended_by_outcome, open_run
from tasks.train import train
from tasks.validate_config import validate_config


class Outcome(Artifact):
    """What a run reached, where it lies, and how to look at it."""

    name: str
    report: EvaluationReport
    tokens_seen: int
    folder: Path
    model: Path
    mlflow_uri: str
    mlflow_run_id: str | None
    look_prefect: str
    """Shows Prefect's pages on this run: a command, or an address where a server runs."""
    look_mlflow: str
    """The same for MLflow."""


def _flow_run_name() -> str:
    """The run's name; the config file's where that cannot be read, which the flow will say."""
    parameters = flow_run.get_parameters()
    path = Path(parameters["config"])
    try:
        raw = merged(read_toml(path), parameters["overrides"] or {})
        return str(raw["run"]["name"])
    except (GPTError, KeyError, TypeError):
        return path.stem


@flow(name="pretrain", flow_run_name=_flow_run_name)
def pretrain(config: str, overrides: dict[str, Any] | None = None, fresh: bool = False) -> Outcome:
    """Pretrain a GPT from Parquet to an evaluated, tracked model.

    Args:
        config: Path of a TOML config.
        overrides: Values laid over the config, key by key: {"training": {"max_steps": 20}}.
        fresh: Begin a new run folder even where this run can be gone on with.
    """
    checked = validate_config(config, overrides or {})
    dataset = tokenize_parquet(checked)
    run = open_run(checked, dataset, open_run_folder(checked, dataset, fresh=fresh))
    with ended_by_outcome(run):
        checkpoint = train(checked, dataset, run)
        report = evaluate(checked, dataset, checkpoint, run)
    outcome = Outcome(
        name=checked.run.name,
        report=report,
        tokens_seen=checkpoint.tokens_seen,
        folder=run.folder.resolve(),
        model=(checkpoint.folder / "model.safetensors").resolve(),
        mlflow_uri=run.uri,
        mlflow_run_id=run.run_id,
        look_prefect=_look_prefect(checked),
        look_mlflow=_look_mlflow(run),
    )
    create_markdown_artifact(
        key=f"result-{re.sub('[^a-z0-9]+', '-', outcome.name.lower()).strip('-')}",
        markdown=result_page(outcome),
        description=f"Validation loss {report.loss:.4f} after {report.step} steps",
    )
    return outcome


def result_page(outcome: Outcome) -> str:
    """The run's result as Markdown."""
    report = outcome.report
    rows = {
        "validation loss": f"{report.loss:.4f} nats a token, over {report.tokens:,} tokens",
        "perplexity": f"{report.perplexity:,.2f}",
        "bits per byte": f"{report.bits_per_byte:.4f}",
        "trained": f"{report.step:,} steps, {outcome.tokens_seen:,} tokens",
        "run folder": f"`{outcome.folder}`",
        "model": f"`{outcome.model}`",
        "MLflow run": f"`{outcome.mlflow_run_id or 'not made yet: MLflow was away'}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    samples = "\n\n".join(
        f"**{sample.prompt}**\n\n{indent(sample.text, ' ' * 4, lambda _: True)}"
        for sample in report.samples
    )
    return (
        f"# {outcome.name}\n\n| | |\n|---|---|\n{table}\n\n"
        f"## Look at it\n\n```sh\n{outcome.look_prefect}\n{outcome.look_mlflow}\n```\n\n"
        f"## What it writes\n\n{samples}\n"
    )


def _look_prefect(config: RunConfig) -> str:
    api = os.environ.get("PREFECT_API_URL", "")
    if api:
        return api.removesuffix("/api")
    home = os.environ.get("PREFECT_HOME", str(prefect_home(config.run.root)))
    settings = f"PREFECT_HOME={shlex.quote(home)} PREFECT_SERVER_ANALYTICS_ENABLED=false"
    return f"{settings} {_program('prefect')} server start"


def _look_mlflow(run: RunRef) -> str:
    if run.uri.startswith("http"):
        return run.uri
    uri = shlex.quote(run.uri)
    return f"DO_NOT_TRACK=1 {_program('mlflow')} ui --backend-store-uri {uri}"


def _program(name: str) -> str:
    """How this environment's program is called from anywhere: by name where the shell finds it."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    return name if found and Path(found) == own else shlex.quote(str(own))
