"""How a process ends: a child with its parent, and no process by waiting for a dead server."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn


class Leaving:
    """Prefect's threads hand over what they have before the process ends. Where its API went away
    there is nobody to take it: of one that hangs they took two minutes to find that out."""

    at_once = False

    def end(self, code: str | int | None) -> NoReturn:
        if self.at_once and isinstance(code, int):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)


leaving = Leaving()


def die_with_parent(number: signal.Signals) -> Callable[[], None]:
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
