"""Prefect state hooks: when a flow run ends, publish a report and notify people.

The report is an artifact of the flow run, and a message through the notification blocks (Slack,
mail, Teams, a webhook, ...) that `run.notify` names; its first line says what to do next. Prefect
calls the hooks in the run's own process, or in the worker's if the run's process was killed.
"""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import Flow, State
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled
from prefect.utilities.asyncutils import run_coro_as_sync

from gpt.config.loading import load_config, merge_overrides, read_toml
from gpt.data.tokenize.pipeline import find_dataset
from gpt.errors import GPTError, Problem, first_line
from gpt.markdown import render_table
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.run_dir import find_run_dir
from tasks.display import log_warning
from tasks.runtime.prefect_api import artifact_key
from tasks.tracking.journal import METRICS_FILE, read_metrics

LOSSES = ("final/loss", "val/loss", "train/loss")
"""The first of these metrics that a run has is reported."""
OPTIONS = ("path", "start", "tokens", "seeds", "name")
"""Parameters of a flow that its command takes as options of the same name."""


def notify_end(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """Publish the report of a flow run that has ended. Never raises: a report that cannot be sent
    must not change how the run ended."""
    flow_run = _reload(flow_run)
    subject = f"{flow.name} {flow_run.name}: {state.type.value.lower()}"
    try:
        report = render_report(flow, flow_run, state)
        send_notifications(_block_names(flow_run.parameters), f"overnight: {subject}", report)
        artifact = ArtifactCreate(
            key=_artifact_key(flow_run),
            type="markdown",
            data=report,
            description=subject,
            flow_run_id=flow_run.id,
        )
        with get_client(sync_client=True) as client:
            client.create_artifact(artifact)
    except Exception as error:
        log_warning(f"the end of this run could not be reported: {first_line(error)}")


def notify_cancellation(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """Report a run that Prefect cancelled, unless it reported its end itself."""
    flow_run = _reload(flow_run)
    wanted = {"key": {"any_": [_artifact_key(flow_run)]}, "flow_run_id": {"any_": [flow_run.id]}}
    with get_client(sync_client=True) as client:
        if client.read_artifacts(artifact_filter=ArtifactFilter.model_validate(wanted)):
            return
    notify_end(flow, flow_run, Cancelled(message="cancelled before it started"))


def send_notifications(blocks: Sequence[str], subject: str, body: str) -> None:
    """Send a message through each notification block, named as type/name. A failure is logged."""
    for name in blocks:
        try:
            block = Block.load(name)
            assert isinstance(block, NotificationBlock), "is not a notification block"
            with block.raise_on_failure():
                sending = block.notify(body, subject)
                if inspect.isawaitable(sending):  # some blocks are async, some are not
                    run_coro_as_sync(sending)
        except Exception as error:  # every service has errors of its own
            log_warning(f"run.notify = {name}: the message was not sent: {first_line(error)}")


def _reload(flow_run: FlowRun) -> FlowRun:
    """Return the run as the API has it: a worker knows it by its name from before it started."""
    with suppress(Exception), get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run.id)
    return flow_run


def _artifact_key(flow_run: FlowRun) -> str:
    return artifact_key(f"end-{flow_run.name}")


def render_report(flow: Flow, run: FlowRun, state: State) -> str:
    """Return the report as Markdown: what to do next, config, result, reason."""
    command = resume_command(flow, run)
    error = _find_error(state)
    rows = {
        "ended": f"{state.name}, {run.name} of the flow {flow.name}",
        "config": ", ".join(f"`{path}`" for path in _config_paths(run.parameters)),
        "overrides": f"`{json.dumps(run.parameters.get('overrides') or {})}`",
        "result": "; ".join(_describe_results(run.parameters, state)) or "none yet",
        "resume with": f"`{command}`",
    }
    reason = str(error or state.message or "").strip()
    why = f"\n\n## Reason\n\n```\n{reason}\n```" if reason and not state.is_completed() else ""
    if state.is_completed():
        next_step = "Finished; there is nothing to do."
    elif isinstance(error, GPTError):
        next_step = f"{describe_remedies(error.problems)}; then `{command}`"
    else:
        next_step = f"Run it again to resume from its last checkpoint: `{command}`"
    return f"{next_step}\n\n{render_table(rows.items())}{why}\n"


def describe_remedies(problems: tuple[Problem, ...]) -> str:
    """Return what the user can do about the problems, on one line."""
    remedies = [f"{p.key}: {p.remedy}" for p in problems]
    return "To do: " + "; ".join(dict.fromkeys(remedies))


def resume_command(flow: Flow, run: FlowRun) -> str:
    """Return the command that starts the same run again, which resumes it."""
    if run.deployment_id:
        with suppress(Exception), get_client(sync_client=True) as client:
            deployment = client.read_deployment(run.deployment_id)
            defaults = deployment.parameters
            changed = {k: v for k, v in run.parameters.items() if defaults.get(k) != v and v}
            words = [f"-p {shlex.quote(f'{k}={json.dumps(v)}')}" for k, v in changed.items()]
            return " ".join(["prefect deployment run", f"{flow.name}/{deployment.name}", *words])
    command = "run" if flow.name == "pretrain" else flow.name
    words = [f"--set {shlex.quote(text)}" for text in _flatten(run.parameters.get("overrides"))]
    options = {k: run.parameters[k] for k in OPTIONS if run.parameters.get(k)}
    words += [f"--{key} {shlex.quote(str(value))}" for key, value in options.items()]
    return " ".join(["overnight", command, *_config_paths(run.parameters), *words])


def _flatten(overrides: Mapping[str, Any] | None, prefix: str = "") -> Iterator[str]:
    for key, value in (overrides or {}).items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{key}={text}"


def _config_paths(parameters: Mapping[str, Any]) -> list[str]:
    return list(parameters.get("configs") or [parameters["config"]])


def _find_error(state: State) -> object:
    """Return the exception that the run failed with, if it was raised in this process."""
    if state.is_failed():
        with suppress(Exception):
            return state.result(raise_on_failure=False)
    return None


def _describe_results(parameters: Mapping[str, Any], state: State) -> Iterator[str]:
    """Describe the flow's result, or how far each config's run folder got."""
    if state.is_completed():
        with suppress(Exception):
            yield str(state.result())
        return
    for path in _config_paths(parameters):
        with suppress(GPTError, OSError):
            config = load_config(path, parameters.get("overrides") or {})
            dataset = find_dataset(config)
            folder = dataset and find_run_dir(config, dataset)
            if folder:
                yield from _describe_progress(folder)


def _describe_progress(folder: Path) -> Iterator[str]:
    lines, _ = read_metrics(folder / METRICS_FILE)
    for key in LOSSES:
        steps = {line.step: line.metrics[key] for line in lines if key in line.metrics}
        if steps:
            yield f"{key} {steps[max(steps)]:.4f} at step {max(steps):,}"
            break
    if checkpoint := latest_checkpoint(folder):
        yield f"a checkpoint of step {checkpoint.step:,}"


def _block_names(parameters: Mapping[str, Any]) -> list[str]:
    """Return `run.notify` of all configs, even of invalid ones."""
    names: list[str] = []
    for path in _config_paths(parameters):
        with suppress(GPTError, KeyError, TypeError):
            raw = merge_overrides(read_toml(Path(path)), parameters.get("overrides") or {})
            names += [name for name in raw["run"].get("notify", ()) if "/" in str(name)]
    return list(dict.fromkeys(names))
