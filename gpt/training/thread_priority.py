"""Threads that work beside the training."""

from __future__ import annotations

import contextlib
import os
import sys

LOWEST_PRIORITY = 19


def lower_thread_priority() -> None:
    """Let the calling thread have only what the others leave of the processors.

    On two cores that train, a thread of equal rank takes its share from one of torch's, and the
    others wait for that one. On Linux alone, where priorities are those of threads.
    """
    if sys.platform == "linux":
        with contextlib.suppress(PermissionError):  # a container may forbid it
            os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY)
