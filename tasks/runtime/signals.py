"""Signals from outside: training keeps what it has done, everything else ends at once.

SIGTERM (a cancelled flow run, a time limit, a shutdown) and SIGINT (Ctrl-C) are taken alike. While
`stopping.gracefully()` is open they only make `stopping.requested()` true, which training asks
between two micro-batches; elsewhere they raise `StopRequested`, because whatever is broken off
there is done again from what it left. Prefect kills what is still there 29 s after its SIGTERM.

Where a job may be taken away and planned again (docs/deploy.md) SIGTERM stays with Prefect, which
asks nobody whose handler is not its own: its exception breaks training off after the last whole
step, which becomes a checkpoint, and what becomes of the run is Prefect's affair.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PREFECT_DECIDES = "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"
GRACE_SECONDS = 10.0
"""For training to come to the end of a micro-batch; compiling the first one can take longer."""
REPEATED_SECONDS = 2.0
"""A signal so soon after another is the same one, sent to the process and to its group."""


class StopRequested(BaseException):
    """The run was asked to stop, by `signal`; it stands `after_step`, where that is known."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.after_step: int | None = None

    def __str__(self) -> str:
        where = "" if self.after_step is None else f" after step {self.after_step}"
        return f"stopped by {self.signal.name}{where}"


class StopSignals:
    """Takes the signals while it is entered; in another thread than the main one it takes none.

    `signal`, the first one taken, can be read until it is entered again.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.signal: int | None = None
        self._last = -REPEATED_SECONDS
        self._graceful = False
        self._insistence: threading.Timer | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._reset()
        if threading.current_thread() is threading.main_thread():
            behaviour = os.environ.get(PREFECT_DECIDES, "").lower()
            taken = SIGNALS[:1] if behaviour in ("reschedule", "relinquish") else SIGNALS
            self._before = {number: signal.signal(number, self._take) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        self._no_more_insistence()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        return self.signal is not None

    @contextmanager
    def graceful_stop(self) -> Iterator[None]:
        """Let what is inside look at `requested` and end by itself; raises `StopRequested` after it
        where that was asked for, and in the midst of it when it takes too long."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False
            self._no_more_insistence()
        if self.signal is not None:
            raise StopRequested(self.signal)

    def _take(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        repeated, self._last = now - self._last < REPEATED_SECONDS, now
        if repeated:
            return
        first = self.signal is None
        self.signal = self.signal or number
        if not (first and self._graceful):
            raise StopRequested(self.signal)
        self._insistence = threading.Timer(GRACE_SECONDS, os.kill, (os.getpid(), number))
        self._insistence.daemon = True
        self._insistence.start()

    def _no_more_insistence(self) -> None:
        if self._insistence:
            self._insistence.cancel()


stopping = StopSignals()
"""Of this process: a signal has one handler."""
