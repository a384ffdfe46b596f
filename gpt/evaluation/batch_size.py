"""Out of memory in an evaluation: continue with half the batch size, which changes no result."""

from __future__ import annotations

import logging

import torch

from gpt.errors import OutOfMemoryError, Problem

logger = logging.getLogger(__name__)


def halve_batch_size(batch_size: int) -> int:
    """Return half of `batch_size` after freeing the allocator's cached memory.

    Call it outside the `except` block: the traceback keeps the tensors of the failed batch alive.
    Raises `OutOfMemoryError` if `batch_size` is 1.
    """
    if batch_size == 1:
        raise OutOfMemoryError(
            Problem(
                "evaluation.batch_size",
                "1",
                "the device runs out of memory evaluating a single sequence",
                "close other programs that use the device, or train a smaller model",
            )
        )
    logger.warning("out of memory in evaluation: continuing with batch size %d", batch_size // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return batch_size // 2
