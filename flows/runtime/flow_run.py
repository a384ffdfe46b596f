"""What every flow does around its stages: stop on a signal, and report how it ended."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from prefect import State, Task
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Failed

from flows.runtime.hooks import describe_remedies, notify_cancellation, notify_end
from gpt.errors import GPTError
from gpt.gc_tuning import tune_gc
from tasks.runtime.signals import StopRequested, stop_signals

P = ParamSpec("P")
R = TypeVar("R")
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

    # Prefect looks up annotations in this module unless they are evaluated already.
    wrapped.__signature__ = inspect.signature(run, eval_str=True)  # type: ignore[attr-defined]
    return wrapped
