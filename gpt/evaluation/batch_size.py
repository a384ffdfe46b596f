"""Out of memory in an evaluation: start again with half the batch size, which changes no result."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from gpt.errors import OutOfMemoryError, Problem
from gpt.evaluation.progress import ProgressGenerator, Result
from gpt.hardware.device import is_out_of_memory
from gpt.model.base import GPT

logger = logging.getLogger(__name__)


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
            batch_size = _halve(batch_size)
    finally:
        model.train(was_training)


def _halve(batch_size: int) -> int:
    if batch_size == 1:
        raise OutOfMemoryError(
            Problem(
                "evaluation.batch_size",
                "1",
                "the device runs out of memory evaluating a single sequence",
                "close other programs that use the device, or train a smaller model",
            )
        )
    logger.warning("out of memory in evaluation: starting again with half the batch size")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return batch_size // 2
