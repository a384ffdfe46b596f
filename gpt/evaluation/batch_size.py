"""Out of memory in an evaluation: half the batch, and the same numbers."""

from __future__ import annotations

import logging

import torch

from gpt.errors import OutOfMemoryError, Problem

logger = logging.getLogger(__name__)


def halve_batch_size(sequences: int) -> int:
    """Half as many sequences, the device's unused memory given back first. Raises
    `OutOfMemoryError` where one is too many.

    To be called outside the handler of the error: its traceback keeps the batch's tensors alive.
    """
    if sequences == 1:
        raise OutOfMemoryError(
            Problem(
                "evaluation.batch_size",
                "1",
                "the device runs out of memory while evaluating one sequence",
                "close what else uses the device, or train a smaller model",
            )
        )
    logger.warning("out of memory in evaluation: going on with batch %d", sequences // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return sequences // 2
