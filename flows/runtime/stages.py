"""How a flow runs its stages: as tasks or as plain functions, until a signal stops it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prefect import State, Task
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Failed

from flows.runtime.hooks import describe_remedies, notify_cancellation, notify_end
from gpt.errors import GPTError
from gpt.gc_tuning import tune_gc
from tasks.runtime.signals import StopRequested, stop_signals

Result = TypeVar("Result")
Call = Callable[[Task], Callable[..., Any]]
"""How a stage is called."""
STATE_HOOKS: dict[str, Any] = {
    "on_completion": [notify_end],
    "on_failure": [notify_end],
    "on_crashed": [notify_end],
    "on_cancellation": [notify_cancellation],
}
"""For `@flow`: every end but the one by a signal, which `run_flow` tells of."""


def as_task(stage: Task) -> Callable[..., Any]:
    return stage


def as_function(stage: Task) -> Callable[..., Any]:
    return stage.fn


def run_flow(run: Callable[[], Result]) -> Result | State:
    """What `run` returns, for a flow whose end is told (`flows.runtime.hooks`): Cancelled where a
    signal stopped it, Failed with what to do first where the user can mend it."""
    tune_gc()  # where Prefect has started this process
    try:
        returned = cancelled_on_signal(run)
    except GPTError as error:
        return Failed(message=f"{describe_remedies(error.problems)}\n\n{error}", data=error)
    context = FlowRunContext.get()
    if isinstance(returned, State) and context and context.flow and context.flow_run:
        # Prefect has hooks for what it cancels itself alone, and calls them in another process.
        notify_end(context.flow, context.flow_run, returned)
    return returned


def cancelled_on_signal(run: Callable[[], Result]) -> Result | State:
    """What `run` returns; Cancelled where a signal stopped it."""
    with stop_signals:
        try:
            return run()
        except StopRequested as stop:
            return Cancelled(message=f"{stop}; the same command goes on from there")
