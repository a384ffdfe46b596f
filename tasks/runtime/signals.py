"""Stop signals: training finishes its micro-batch and writes a checkpoint, the rest stops at once.

SIGTERM (a cancelled flow run, a timeout, a shutdown) and SIGINT (Ctrl-C) are handled alike. Inside
`stop_signals.graceful_stop()` they only make `stop_signals.requested()` true, which training checks
between micro-batches. Elsewhere they raise `StopRequested`: a stage that is interrupted is repeated
on the next run. Prefect kills a process 29 s after its SIGTERM.

Where jobs may be preempted and rescheduled (docs/deployment.md), Prefect keeps SIGTERM, because it
does not call the handlers of others. Its exception interrupts training after the last complete
step, which becomes a checkpoint, and Prefect decides what happens to the run.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PREFECT_DECIDES = "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"
GRACE_SECONDS = 10.0
"""Time for training to finish its micro-batch; compiling the first one can take longer."""
REPEATED_SECONDS = 2.0
"""A second signal within this time is the same one, sent to the process and to its group."""


class StopRequested(BaseException):
    """The run was asked to stop by `signal`; `after_step` is its last step, if known."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.after_step: int | None = None

    def __str__(self) -> str:
        where = "" if self.after_step is None else f" after step {self.after_step}"
        return f"stopped by {self.signal.name}{where}"


class StopSignals:
    """Context manager that handles the stop signals; does nothing outside of the main thread.

    `signal`, the first one received, can be read until the next entry.
    """

    signal: int | None = None
    _is_graceful = False
    _repeat: threading.Timer | None = None

    def __enter__(self) -> Self:
        self.signal = None
        self._last = -REPEATED_SECONDS
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            behavior = os.environ.get(PREFECT_DECIDES, "").lower()
            handled = SIGNALS[:1] if behavior in ("reschedule", "relinquish") else SIGNALS
            self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel_repeat()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        return self.signal is not None

    @contextmanager
    def graceful_stop(self) -> Iterator[None]:
        """Let the block check `requested` and return by itself, then raise `StopRequested`. A block
        that takes longer than `GRACE_SECONDS` is interrupted."""
        self._is_graceful = True
        try:
            yield
        finally:
            self._is_graceful = False
            self._cancel_repeat()
        if self.signal is not None:
            raise StopRequested(self.signal)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        repeated, self._last = now - self._last < REPEATED_SECONDS, now
        if repeated:
            return
        first = self.signal is None
        self.signal = self.signal or number
        if not (first and self._is_graceful):
            raise StopRequested(self.signal)
        self._repeat = threading.Timer(GRACE_SECONDS, os.kill, (os.getpid(), number))
        self._repeat.daemon = True
        self._repeat.start()

    def _cancel_repeat(self) -> None:
        if self._repeat:
            self._repeat.cancel()


stop_signals = StopSignals()
"""The one of this process: a signal has one handler."""
