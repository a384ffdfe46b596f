"""How processes end: this one without waiting for a dead server, a child with its parent."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

_skips_cleanup = False


def skip_cleanup() -> None:
    """Let `exit_process` end this process without the clean-up of its threads: Prefect's would
    wait up to two minutes for an API that hangs."""
    global _skips_cleanup
    _skips_cleanup = True


def exit_process(code: str | int | None) -> NoReturn:
    """Exit like `sys.exit`, at once if `skip_cleanup` was called."""
    if _skips_cleanup and isinstance(code, int):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def die_with_parent(number: signal.Signals) -> Callable[[], None]:
    """Return a `preexec_fn` for `subprocess.Popen`: the child gets the signal when this process
    ends, even by kill -9. Linux only; elsewhere it does nothing."""
    parent = os.getpid()

    def set_parent_death_signal() -> None:
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, number)
        if os.getppid() != parent:  # the parent ended before the call
            os.kill(os.getpid(), number)

    return set_parent_death_signal if sys.platform == "linux" else lambda: None


def stop_process(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Terminate a child process; kill it if it takes longer than `seconds` to end."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
