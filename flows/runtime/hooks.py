"""How a flow run ended, told: a page on the run, and a message where `run.notify` names blocks.

The first line says what to do. Prefect calls `notify_end` as a hook: in the run's own process, and
in the worker's for a run whose process was killed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import Flow, State
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled

from flows.runtime.notify import notify
from gpt.config.loading import load_config, merge_overrides, read_toml
from gpt.data.tokenize.pipeline import find_dataset
from gpt.errors import GPTError, Problem
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.run_dir import find_run_dir
from tasks.display import log_warning
from tasks.runtime.prefect_api import artifact_key
from tasks.tracking.journal import METRICS_FILE, read_metrics

LOSSES = ("final/loss", "val/loss", "train/loss")
"""The first of these that a run has is what it reached."""
OPTIONS = ("path", "start", "tokens", "seeds", "name")
"""Parameters of a flow that its command has as options of the same name."""


def notify_end(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """The artifact `end-<name>` of the flow run, and a message through the config's blocks. Never
    raises: what cannot be told must not change how the run ended."""
    flow_run = _named(flow_run)
    subject = f"{flow.name} {flow_run.name}: {state.type.value.lower()}"
    try:
        page = ending_page(flow, flow_run, state)
        notify(_blocks(flow_run.parameters), f"overnight: {subject}", page)
        _keep(page, subject, flow_run)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log_warning(f"how this run ended could not be told: {reason}")


def _keep(page: str, subject: str, flow_run: FlowRun) -> None:
    with get_client(sync_client=True) as client:
        client.create_artifact(
            ArtifactCreate(
                key=_key(flow_run),
                type="markdown",
                data=page,
                description=subject,
                flow_run_id=flow_run.id,
            )
        )


def _named(flow_run: FlowRun) -> FlowRun:
    """As Prefect has it by now: a worker knows a run by the name from before it began."""
    with suppress(Exception), get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run.id)
    return flow_run


def notify_cancellation(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """For a run that Prefect cancelled; most have told of it themselves, before they ended."""
    flow_run = _named(flow_run)
    wanted = ArtifactFilter(
        key=ArtifactFilterKey(any_=[_key(flow_run)]),
        flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]),
    )
    with get_client(sync_client=True) as client:
        if client.read_artifacts(artifact_filter=wanted):
            return
    notify_end(flow, flow_run, Cancelled(message="cancelled before it could begin"))


def _key(flow_run: FlowRun) -> str:
    return artifact_key(f"end-{flow_run.name}")


def ending_page(flow: Flow, run: FlowRun, state: State) -> str:
    """Markdown: what to do, then config, what was reached, the reason."""
    again = command(flow, run)
    error = _error(state)
    rows = {
        "ended": f"{state.name}, {run.name} of the flow {flow.name}",
        "config": ", ".join(f"`{path}`" for path in _configs(run.parameters)),
        "laid over it": f"`{json.dumps(run.parameters.get('overrides') or {})}`",
        "reached": "; ".join(_reached(run.parameters, state)) or "nothing yet",
        "goes on with": f"`{again}`",
    }
    table = "\n".join(f"| {name} | {value.replace('|', ' ')} |" for name, value in rows.items())
    reason = str(error or state.message or "").strip()
    why = f"\n\n## Why\n\n```\n{reason}\n```" if reason and not state.is_completed() else ""
    return f"{headline(state, error, again)}\n\n| | |\n|---|---|\n{table}{why}\n"


def headline(state: State, error: object, again: str) -> str:
    if state.is_completed():
        return "It is done, there is nothing to do."
    if isinstance(error, GPTError):
        return f"{describe_remedies(error.problems)}; then `{again}`"
    return f"Start it again, it goes on from its last checkpoint: `{again}`"


def describe_remedies(problems: tuple[Problem, ...]) -> str:
    """What the user can mend, in one line."""
    remedies = [f"{p.key}: {p.remedy}" for p in problems]
    return "To do: " + "; ".join(dict.fromkeys(remedies))


def command(flow: Flow, run: FlowRun) -> str:
    """What starts the same run again, which goes on where it stood."""
    if run.deployment_id:
        with suppress(Exception), get_client(sync_client=True) as client:
            deployment = client.read_deployment(run.deployment_id)
            given = deployment.parameters
            changed = {k: v for k, v in run.parameters.items() if given.get(k) != v and v}
            words = [f"-p {shlex.quote(f'{k}={json.dumps(v)}')}" for k, v in changed.items()]
            return " ".join(["prefect deployment run", f"{flow.name}/{deployment.name}", *words])
    verb = "run" if flow.name == "pretrain" else flow.name
    words = [f"--set {shlex.quote(text)}" for text in _settings(run.parameters.get("overrides"))]
    options = {k: run.parameters[k] for k in OPTIONS if run.parameters.get(k)}
    words += [f"--{key} {shlex.quote(str(value))}" for key, value in options.items()]
    return " ".join(["overnight", verb, *_configs(run.parameters), *words])


def _settings(overrides: Mapping[str, Any] | None, above: str = "") -> Iterator[str]:
    for key, value in (overrides or {}).items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{above}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{above}{key}={text}"


def _configs(parameters: Mapping[str, Any]) -> list[str]:
    return list(parameters.get("configs") or [parameters["config"]])


def _error(state: State) -> object:
    """The exception that a run failed with, where it happened in this process."""
    if not state.is_failed():
        return None
    with suppress(Exception):
        return state.result(raise_on_failure=False)
    return None


def _reached(parameters: Mapping[str, Any], state: State) -> Iterator[str]:
    """In the words of the flow where it came to its end; else as each run's journal has it."""
    if state.is_completed():
        with suppress(Exception):
            yield str(state.result())
        return
    for path in _configs(parameters):
        with suppress(GPTError, OSError):
            config = load_config(path, parameters.get("overrides") or {})
            dataset = find_dataset(config)
            folder = dataset and find_run_dir(config, dataset)
            if folder:
                yield from _standing(folder)


def _standing(folder: Path) -> Iterator[str]:
    lines, _ = read_metrics(folder / METRICS_FILE)
    for key in LOSSES:
        steps = {line.step: line.metrics[key] for line in lines if key in line.metrics}
        if steps:
            yield f"{key} {steps[max(steps)]:.4f} at step {max(steps):,}"
            break
    if checkpoint := latest_checkpoint(folder):
        yield f"a checkpoint of step {checkpoint.step:,}"


def _blocks(parameters: Mapping[str, Any]) -> list[str]:
    """`run.notify` of the configs, also where one of them cannot work."""
    names: list[str] = []
    for path in _configs(parameters):
        with suppress(GPTError, KeyError, TypeError):
            raw = merge_overrides(read_toml(Path(path)), parameters.get("overrides") or {})
            names += [name for name in raw["run"].get("notify", ()) if "/" in str(name)]
    return list(dict.fromkeys(names))
