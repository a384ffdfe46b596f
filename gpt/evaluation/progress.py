"""Evaluations that take a while: generators that yield their progress and end with a result."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class EvaluationProgress:
    description: str
    """What is being measured, as a person would say it."""
    completed: int
    total: int


ProgressGenerator = Generator[EvaluationProgress, None, Result]


def run_to_completion(running: ProgressGenerator[Result]) -> Result:
    """The result, with no progress told."""
    while True:
        try:
            next(running)
        except StopIteration as end:
            return end.value
