"""How a flow runs its stages: as tasks or as plain functions, until a signal stops it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prefect import State, Task
from prefect.states import Cancelled

from tasks.stopping import StopRequested, stopping

Result = TypeVar("Result")
Call = Callable[[Task], Callable[..., Any]]
"""How a stage is called."""


def as_task(stage: Task) -> Callable[..., Any]:
    return stage


def as_function(stage: Task) -> Callable[..., Any]:
    return stage.fn


def stopped_or(run: Callable[[], Result]) -> Result | State:
    """What `run` returns; Cancelled where a signal stopped it."""
    with stopping:
        try:
            return run()
        except StopRequested as stop:
            return Cancelled(message=f"{stop}; the same command goes on from there")
