"""Run a flow from the command line: under Prefect if its API answers, without it if not."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import Flow, State
from prefect.exceptions import CancelledRun

from flows.runtime.embedded_api import start_api
from flows.runtime.outcome import Outcome
from flows.runtime.process_exit import skip_cleanup
from gpt.config.loading import load_config
from gpt.errors import ConfigError, first_line
from tasks.display import log_warning
from tasks.runtime.prefect_api import is_api_unreachable
from tasks.runtime.signals import stop_signals

if TYPE_CHECKING:
    from flows.compare import ComparisonResult
    from flows.runtime.retrain_report import RetrainResult
    from tasks.find_changes import StartFrom

SIGNAL_EXIT_CODE = 128
"""Exit code of a process that a signal ended, less the signal's number."""


def run_pretrain(
    config: str, overrides: dict[str, Any], fresh: bool, parent: Path | None = None
) -> Outcome:
    """Run the flow `pretrain`. `parent`: folder of the comparison that the run is part of."""
    from flows.pretrain import pretrain

    before = _run_dirs(config, overrides)

    def retry_parameters() -> dict[str, Any]:
        # Resume a fresh run that has started already instead of starting another one.
        return {"fresh": fresh and _run_dirs(config, overrides) == before}

    above = str(parent) if parent else None
    parameters = {"config": config, "overrides": overrides, "fresh": fresh, "parent": above}
    return cast(Outcome, _run(pretrain, parameters, retry_parameters))


def run_compare(
    configs: list[str], overrides: dict[str, Any], tokens: int | None, seeds: int, name: str
) -> ComparisonResult:
    """Run the flow `compare`."""
    from flows.compare import compare

    parameters = {"configs": configs, "overrides": overrides, "tokens": tokens}
    return cast("ComparisonResult", _run(compare, parameters | {"seeds": seeds, "name": name}))


def run_retrain(
    config: str, overrides: dict[str, Any], path: str | None, start: StartFrom
) -> RetrainResult:
    """Run the flow `retrain`. If the source holds nothing new, skip Prefect: starting its API takes
    longer than finding that out."""
    from flows.retrain import check_up_to_date, retrain

    if result := check_up_to_date(config, overrides, path, start):
        return result
    parameters = {"config": config, "overrides": overrides, "path": path, "start": start}
    return cast("RetrainResult", _run(retrain, parameters))


def _run(
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


def _run_dirs(config: str, overrides: dict[str, Any]) -> set[Path]:
    try:
        return set((load_config(config, overrides).run.root / "train").glob("*"))
    except ConfigError:  # reported by the flow
        return set()
