"""The flow as the command line runs it: Prefect's API beside it, and not in its way."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prefect import State
from prefect.exceptions import CancelledRun

from flows.runtime.embedded_api import start_api
from flows.runtime.outcome import Outcome
from flows.runtime.process_exit import leaving
from gpt.config.loading import load_config
from gpt.errors import ConfigError
from tasks.display import log_warning
from tasks.runtime.prefect_api import is_api_unreachable
from tasks.runtime.signals import stop_signals

if TYPE_CHECKING:
    from flows.compare import ComparisonResult
    from flows.runtime.retrain_report import RetrainResult
    from tasks.find_changes import StartFrom

SIGNALLED = 128
"""Added to a signal's number this is the exit code of what it ended."""


def run_pretrain(
    config: str, overrides: dict[str, Any], fresh: bool, parent: Path | None = None
) -> Outcome:
    """The flow `pretrain`; below the comparison of the folder `parent`."""
    from flows.pretrain import pretrain, pretrain_without_prefect

    above = str(parent) if parent else None
    before = _run_folders(config, overrides)

    def without() -> Any:
        # What has begun fresh is gone on with.
        begun = _run_folders(config, overrides) - before
        return pretrain_without_prefect(config, overrides, fresh and not begun, above)

    return cast(Outcome, _run(lambda: pretrain(config, overrides, fresh, above), without))


def run_compare(
    configs: list[str], overrides: dict[str, Any], tokens: int | None, seeds: int, name: str
) -> ComparisonResult:
    """The flow `compare`."""
    from flows.compare import compare, compare_without_prefect

    asked = (configs, overrides, tokens, seeds, name)
    return cast(
        "ComparisonResult", _run(lambda: compare(*asked), lambda: compare_without_prefect(*asked))
    )


def run_retrain(
    config: str, overrides: dict[str, Any], path: str | None, start: StartFrom
) -> RetrainResult:
    """The flow `retrain`; where the source holds nothing new, its result without Prefect, whose API
    takes longer to start than that takes to find out."""
    from flows.retrain import check_up_to_date, retrain, retrain_without_prefect

    asked = (config, overrides, path, start)
    if ended := check_up_to_date(*asked):
        return ended
    return cast(
        "RetrainResult", _run(lambda: retrain(*asked), lambda: retrain_without_prefect(*asked))
    )


def _run(under_prefect: Callable[[], Any], without: Callable[[], Any]) -> Any:
    """Run a flow under Prefect; without, where its API is away or goes away.

    Every stage finds what it has done before, so beginning again costs next to nothing. Exits with
    128 plus the signal's number, after a line, where a signal stopped the run.
    """
    # Python's switch for production: a log line that cannot be delivered is nobody's business.
    logging.raiseExceptions = False
    try:
        if fault := start_api():
            _warn_of(fault)
            return _result(without())
        try:
            return _result(under_prefect())
        except Exception as error:
            if not is_api_unreachable(error):
                raise
            _warn_of(error)
            leaving.at_once = True
        return _result(without())
    except CancelledRun as cancelled:
        print(f"\n{cancelled}", file=sys.stderr)
        sys.exit(SIGNALLED + (stop_signals.signal or signal.SIGTERM))


def _run_folders(config: str, overrides: dict[str, Any]) -> set[Path]:
    try:
        return set((load_config(config, overrides).run.root / "train").glob("*"))
    except ConfigError:  # which the flow tells
        return set()


def _warn_of(fault: Exception) -> None:
    reason = (str(fault).splitlines() or [type(fault).__name__])[0]
    log_warning(f"Prefect's API is away ({reason}); the run goes on without it")


def _result(returned: Any) -> Any:
    """Outside of Prefect a stopped run is a state like any other value."""
    if isinstance(returned, State):
        raise CancelledRun(returned.message)
    return returned
