"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from functools import partial


def ending_with_me(number: signal.Signals) -> Callable[[], None]:
    """For `subprocess.Popen(preexec_fn=...)`: the child gets the signal when this process ends,
    however it ends. On Linux alone."""
    return partial(_end_with, os.getpid(), number)


def _end_with(parent: int, number: signal.Signals) -> None:
    if sys.platform != "linux":
        return
    parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
    ctypes.CDLL(None).prctl(parent_death_signal, number)
    if os.getppid() != parent:  # it ended before that call
        os.kill(os.getpid(), number)
