"""Time limits that grow with the slowness of the machine, and waiting within them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

SLOWNESS = "OVERNIGHT_TEST_SLOWNESS"
"""Environment variable, so that all processes of a test run share one measurement."""
ADDITIONS = 5_000_000
ADDITION_SECONDS = 0.14
"""`ADDITIONS` in Python on an idle core of the machine on which the limits were chosen."""
HEADROOM = 4.0
"""Limits are for hangs, and other work may begin on the machine after the measurement."""


def measure_slowness() -> float:
    """How much longer than on the reference machine a fixed piece of work takes; at least 1."""
    begin = time.monotonic()
    total = 0
    for i in range(ADDITIONS):
        total += i
    return max(1.0, (time.monotonic() - begin) / ADDITION_SECONDS)


def scaled(seconds: float) -> float:
    """A limit that is generous where `seconds` are enough on two quiet cores."""
    if SLOWNESS not in os.environ:
        os.environ[SLOWNESS] = str(measure_slowness())
    return seconds * HEADROOM * float(os.environ[SLOWNESS])


def wait_for(what: str, found: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true value of `found()`. Raises AssertionError after `scaled(seconds)`."""
    end = time.monotonic() + scaled(seconds)
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(f"timed out waiting for {what}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
