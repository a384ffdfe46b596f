"""The priority of threads that run beside training."""

import contextlib
import os
import sys

LOWEST_PRIORITY = 19


def lower_thread_priority() -> None:
    """Give the calling thread only the CPU time that other threads leave.

    On a machine with few cores, a thread of equal priority delays one of torch's threads, and the
    others wait for that one. Linux only, where each thread has its own priority.
    """
    if sys.platform == "linux":
        with contextlib.suppress(PermissionError):  # a container may forbid it
            os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY)
