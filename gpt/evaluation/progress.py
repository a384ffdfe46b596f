"""Evaluations are generators that yield their progress and return their result."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class EvaluationProgress:
    description: str
    """What is being evaluated, for a progress bar."""
    completed: int
    total: int


ProgressGenerator = Generator[EvaluationProgress, None, Result]


def run_to_completion(evaluation: ProgressGenerator[Result]) -> Result:
    """Run an evaluation without showing its progress and return its result."""
    while True:
        try:
            next(evaluation)
        except StopIteration as end:
            return end.value
