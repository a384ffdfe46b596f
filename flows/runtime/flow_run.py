"""What every flow does around its stages: stop on a signal, and report how it ended.

The report is an artifact of the flow run, and a message through the notification blocks (Slack,
mail, Teams, a webhook, ...) that `run.notify` names; its first line says what to do next. Prefect
calls the hooks in the run's own process, or in the worker's if the run's process was killed.
"""

import inspect
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from itertools import islice
from typing import Any, ParamSpec, TypeVar

from prefect import Flow, State, Task
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Failed
from prefect.utilities.asyncutils import run_coro_as_sync

from gpt.config.loading import load_config, read_run_section
from gpt.data.tokenize.pipeline import find_dataset
from gpt.errors import GPTError, Problem, first_line
from gpt.gc_tuning import tune_gc
from gpt.markdown import render_table
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.run_dir import find_run_dir
from tasks.display import log_warning
from tasks.runtime.prefect_api import artifact_key
from tasks.runtime.signals import StopRequested, stop_signals
from tasks.tracking.journal import METRICS_FILE, read_metrics

P = ParamSpec("P")
R = TypeVar("R")
LOSSES = ("final/loss", "val/loss", "train/loss")
"""The first of these metrics that a run has is reported."""
OPTIONS = ("path", "start", "tokens", "seeds", "name")
"""Parameters of a flow that its command takes as options of the same name."""


def notify_end(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """Publish the report of a flow run that has ended. Never raises: a report that cannot be sent
    must not change how the run ended."""
    try:
        with get_client(sync_client=True) as client:
            with suppress(Exception):  # a worker knows the run by its name from before it started
                flow_run = client.read_flow_run(flow_run.id)
            subject = f"{flow.name} {flow_run.name}: {state.type.value.lower()}"
            report = render_report(flow, flow_run, state)
            send_notifications(flow_run.parameters, f"overnight: {subject}", report)
            artifact = ArtifactCreate(
                key=artifact_key(f"end-{flow_run.name}"),
                type="markdown",
                data=report,
                description=subject,
                flow_run_id=flow_run.id,
            )
            client.create_artifact(artifact)
    except Exception as error:
        log_warning(f"the end of this run could not be reported: {first_line(error)}")


def notify_cancellation(flow: Flow, flow_run: FlowRun, state: State) -> None:
    """Report a run that Prefect cancelled, unless it reported its end itself."""
    own = ArtifactFilter.model_validate({"flow_run_id": {"any_": [flow_run.id]}})
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(artifact_filter=own)
    if not any(str(artifact.key).startswith("end-") for artifact in artifacts):
        notify_end(flow, flow_run, Cancelled(message="cancelled before it started"))


def send_notifications(parameters: Mapping[str, Any], subject: str, body: str) -> None:
    """Send a message through each notification block (type/name) of `run.notify`, even of an
    invalid config. A failure is logged."""
    overrides = parameters.get("overrides") or {}
    sections = [read_run_section(path, overrides) for path in _config_paths(parameters)]
    names = dict.fromkeys(str(n) for section in sections for n in section.get("notify") or ())
    for name in (name for name in names if "/" in name):
        try:
            block = Block.load(name)
            assert isinstance(block, NotificationBlock), "is not a notification block"
            with block.raise_on_failure():
                sending = block.notify(body, subject)
                if inspect.isawaitable(sending):  # some blocks are async, some are not
                    run_coro_as_sync(sending)
        except Exception as error:  # every service has errors of its own
            log_warning(f"run.notify = {name}: the message was not sent: {first_line(error)}")


def render_report(flow: Flow, run: FlowRun, state: State) -> str:
    """Return the report as Markdown: what to do next, config, result, reason."""
    command, error = resume_command(flow, run), None
    if state.is_failed():
        with suppress(Exception):  # known only in the process that raised it
            error = state.result(raise_on_failure=False)
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
    return "To do: " + "; ".join(dict.fromkeys(f"{p.key}: {p.remedy}" for p in problems))


def resume_command(flow: Flow, run: FlowRun) -> str:
    """Return the command that starts the same run again, which resumes it."""
    if run.deployment_id:
        with suppress(Exception), get_client(sync_client=True) as client:
            deployment = client.read_deployment(run.deployment_id)
            words = ["prefect", "deployment", "run", f"{flow.name}/{deployment.name}"]
            for key, value in run.parameters.items():
                if value and value != deployment.parameters.get(key):
                    words += ["-p", f"{key}={json.dumps(value)}"]
            return shlex.join(words)
    command = "run" if flow.name == "pretrain" else flow.name
    words = ["overnight", command, *_config_paths(run.parameters)]
    for text in _flatten(run.parameters.get("overrides")):
        words += ["--set", text]
    for key in OPTIONS:
        if value := run.parameters.get(key):
            words += [f"--{key}", str(value)]
    return shlex.join(words)


def _flatten(overrides: Mapping[str, Any] | None, prefix: str = "") -> Iterator[str]:
    for key, value in (overrides or {}).items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{key}={text}"


def _config_paths(parameters: Mapping[str, Any]) -> list[str]:
    return list(parameters.get("configs") or [parameters["config"]])


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
            if folder := dataset and find_run_dir(config, dataset):
                lines = read_metrics(folder / METRICS_FILE)[0][::-1]
                last = ((key, line) for key in LOSSES for line in lines if key in line.metrics)
                for key, line in islice(last, 1):
                    yield f"{key} {line.metrics[key]:.4f} at step {line.step:,}"
                if checkpoint := latest_checkpoint(folder):
                    yield f"a checkpoint of step {checkpoint.step:,}"


STATE_HOOKS: dict[str, Any] = {
    "on_completion": [notify_end],
    "on_failure": [notify_end],
    "on_crashed": [notify_end],
    "on_cancellation": [notify_cancellation],
}
"""For `@flow`: everything but a stop by a signal, which `cancelled_on_signal` reports."""


def call_task(task: Task[P, R]) -> Callable[P, R]:
    """Return the task inside a flow run, and its plain function outside one.

    So `flow.fn(...)` runs the same stages where Prefect's API is unreachable.
    """
    return task if FlowRunContext.get() else task.fn


def cancelled_on_signal(run: Callable[P, R]) -> Callable[P, R | State]:
    """Decorate a flow's function: Cancelled if a signal stops it, Failed with the remedy first if
    it raises a `GPTError` inside a flow run."""

    @wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R | State:
        tune_gc()  # for a process that Prefect's worker started
        context = FlowRunContext.get()
        with stop_signals:
            try:
                return run(*args, **kwargs)
            except StopRequested as stop:
                state: State = Cancelled(message=f"{stop}; re-run the same command to resume")
            except GPTError as error:
                if context is None:
                    raise
                return Failed(message=f"{describe_remedies(error.problems)}\n\n{error}", data=error)
        if context and context.flow and context.flow_run:
            # Prefect calls `on_cancellation` only for what it cancels itself, in another process.
            notify_end(context.flow, context.flow_run, state)
        return state

    return wrapped
