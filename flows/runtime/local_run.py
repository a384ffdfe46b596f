"""Run a flow from the command line: under Prefect if its API answers, without it if not."""

import logging
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect import Flow, State
from prefect.exceptions import CancelledRun

from flows.pretrain import pretrain
from flows.runtime.embedded_api import start_api
from flows.runtime.outcome import Outcome
from flows.runtime.process_exit import skip_cleanup
from gpt.config.loading import load_config
from gpt.errors import ConfigError, first_line
from tasks.display import log_warning
from tasks.runtime.prefect_api import is_api_unreachable
from tasks.runtime.signals import stop_signals

SIGNAL_EXIT_CODE = 128
"""Exit code of a process that a signal ended, less the signal's number."""


def run_pretrain(
    config: str, overrides: dict[str, Any], fresh: bool = False, parent: str | None = None
) -> Outcome:
    """Run the flow `pretrain`. `parent`: folder of the comparison that the run is part of."""

    def run_dirs() -> set[Path]:
        with suppress(ConfigError):  # reported by the flow
            return set((load_config(config, overrides).run.root / "train").glob("*"))
        return set()

    before = run_dirs()
    parameters = {"config": config, "overrides": overrides, "fresh": fresh, "parent": parent}
    # A fresh run that has started already is resumed, not started a second time.
    return run_flow(pretrain, parameters, lambda: {"fresh": fresh and run_dirs() == before})


def run_flow(
    flow: Flow,
    parameters: Mapping[str, Any],
    retry_parameters: Callable[[], Mapping[str, Any]] = dict,
) -> Any:
    """Run a flow under Prefect, or without it if its API is or becomes unreachable.

    Every stage finds its earlier result, so starting over costs next to nothing. If a signal stops
    the run, print how to resume and exit with 128 plus the signal's number.
    """
    logging.raiseExceptions = False  # a log line that cannot be sent must not print a traceback
    try:
        fault = start_api()
        if fault is None:
            try:
                return _unwrap(flow(**parameters))
            except Exception as error:
                if not is_api_unreachable(error):
                    raise
                fault = error
                skip_cleanup()
        reason = first_line(fault)
        log_warning(f"Prefect's API is unreachable ({reason}); the run continues without it")
        return _unwrap(flow.fn(**{**parameters, **retry_parameters()}))
    except CancelledRun as cancelled:
        print(f"\n{cancelled}", file=sys.stderr)
        sys.exit(SIGNAL_EXIT_CODE + (stop_signals.signal or signal.SIGTERM))


def _unwrap(result: Any) -> Any:
    """Return a flow's result. Outside a flow run a stopped run returns its state: raise it."""
    if isinstance(result, State):
        raise CancelledRun(result.message)
    return result
