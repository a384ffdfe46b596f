"""Evaluations are generators that yield their progress and return their result. Out of memory, one
starts again with half the batch size, which changes no result.
"""

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

import torch

from gpt.errors import OutOfMemoryError, Problem
from gpt.hardware.device import is_out_of_memory, release_memory
from gpt.model.base import GPT

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


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


@torch.no_grad()
def evaluate_in_batches(
    model: GPT, evaluate: Callable[[int], ProgressGenerator[Result]], batch_size: int
) -> ProgressGenerator[Result]:
    """Run `evaluate(batch_size)` in evaluation mode, with half the size after each out-of-memory.

    The model keeps its mode. Raises `OutOfMemoryError` if a batch of size 1 is too large.
    """
    was_training = model.training
    model.eval()
    try:
        while True:
            try:
                return (yield from evaluate(batch_size))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Not in the `except` block: the traceback keeps the tensors of the batch alive.
            if batch_size == 1:
                rule = "the device runs out of memory evaluating a single sequence"
                remedy = "close other programs that use the device, or train a smaller model"
                raise OutOfMemoryError(Problem("evaluation.batch_size", "1", rule, remedy))
            logger.warning("out of memory in evaluation: starting again with half the batch size")
            release_memory(model.head.device)
            batch_size //= 2
    finally:
        model.train(was_training)
