"""The units of a corpus on a Dask or Ray cluster, each a Prefect task that runs there.

The clusters are opened by the task runners of prefect-dask and prefect-ray. They are entered here
and not given to a flow: tokenising is a stage of several flows, and a command of its own. Where
there is no flow run, or where a worker cannot reach Prefect's API (without which Prefect runs no
task), the same function is sent without its task: the API is a page to look at, and nothing
depends on it.

What is on its way is bounded by the workers. What is done waits on the worker that did it, and only
the unit that is to be written next is fetched: this machine holds one at a time, and no file lies
between. A worker that is lost takes with it what it was doing and what it had done; Dask and Ray
have that done again by themselves, and what they give up is sent again from here. One writer takes
the units in order, each once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings

from gpt.config.schema import DataSection
from gpt.data.tokenize.encoders import EncoderMismatchError
from gpt.data.tokenize.requests import Cluster, EncodeRequest, EncodeResult
from gpt.errors import ConfigError, CorpusError, GPTError, Problem
from tasks.cluster.engines import ClusterBackend, check_reachable, open_dask, open_ray
from tasks.runtime.prefect_api import is_api_unreachable

UNITS_PER_WORKER = 2
"""On their way for each worker: the one it encodes, and the next."""
MOST_TRIES = 3
"""Times that a unit is sent. Dask and Ray have tried it four times by themselves each time."""
COUNT_SECONDS = 5.0
"""How often the workers are counted: a cluster may grow."""
WAIT_SECONDS = 0.5
"""A signal is looked at so often while a unit is waited for."""

logger = logging.getLogger(__name__)


def resolve_cluster(data: DataSection) -> Cluster | None:
    """The workers that [data] names; None for those of this machine.

    Raises `ConfigError` where their package is not installed, or where nobody is at the address:
    both are asked now, and no cluster is opened.
    """
    if data.runner == "local":
        return None
    package = f"prefect_{data.runner}"
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(data.runner) is None:
        rule = f"{package.replace('_', '-')} is not installed"
        remedy = f"pip install 'overnight[{data.runner}]', here and on every worker; or leave "
        remedy += "data.runner out"
        raise ConfigError(Problem("data.runner", data.runner, rule, remedy))
    if data.cluster:
        check_reachable(data.runner, data.cluster)
    open_engine = open_dask if data.runner == "dask" else open_ray
    return lambda: _opened(data, open_engine)


@contextlib.contextmanager
def _opened(
    data: DataSection, open_engine: Callable[[DataSection], AbstractContextManager[ClusterBackend]]
) -> Iterator[_Workers]:
    with contextlib.ExitStack() as stack:
        try:
            engine = stack.enter_context(open_engine(data))
        except GPTError:
            raise
        except Exception as error:  # Dask and Ray have many
            rule = f"the {data.runner} cluster cannot be opened: {error}"
            remedy = "check that it runs, and that it has the versions of Python and of the "
            remedy += "packages that are installed here"
            raise ConfigError(Problem("data.cluster", data.cluster, rule, remedy)) from error
        yield stack.enter_context(_Workers(data, engine))


# --- units on their way --------------------------------------------------------------------------


class _Workers:
    """The pool of `gpt.data.tokenize.requests`; entered, it counts its workers."""

    def __init__(self, data: DataSection, engine: ClusterBackend) -> None:
        self.data, self.engine = data, engine
        self.as_task = FlowRunContext.get() is not None
        self._workers = engine.workers()
        self._end = threading.Event()
        # In a thread: where the cluster is gone, Ray never answers.
        self._counting = threading.Thread(target=self._count, name="workers", daemon=True)
        if not self._workers:
            logger.warning("the cluster at %s has no workers yet: waiting for some", data.cluster)

    def __enter__(self) -> _Workers:
        self._counting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._counting.join(WAIT_SECONDS)

    def _count(self) -> None:
        while not self._end.wait(COUNT_SECONDS):
            with contextlib.suppress(Exception):  # told by the units
                self._workers = self.engine.workers()

    @property
    def ahead(self) -> int:
        return UNITS_PER_WORKER * max(1, self._workers)

    def submit(self, order: EncodeRequest) -> _Unit:
        return _Unit(self, order)

    def send(self, order: EncodeRequest) -> Any:
        if not self.as_task:
            return self.engine.send(order)
        with _api_named():
            return self.engine.send_task(order)

    def no_tasks(self) -> None:
        if self.as_task:
            logger.warning("the workers cannot reach Prefect's API: its page will not show units")
        self.as_task = False


@contextlib.contextmanager
def _api_named() -> Iterator[None]:
    """With Prefect's API under the address that it has, so that a task takes it along: without
    one, every worker would start an API of its own."""
    if PREFECT_API_URL.value():
        yield
        return
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    with temporary_settings({PREFECT_API_URL: url}):
        yield


class _Unit:
    """A unit that was sent."""

    def __init__(self, workers: _Workers, order: EncodeRequest) -> None:
        self._workers, self._order = workers, order
        self._tries = 1
        self._send()

    def done(self) -> bool:
        # What is wrong, if anything is, `result` finds too.
        with contextlib.suppress(Exception):
            return self._workers.engine.is_done(self._ticket, 0.0)
        return False

    def result(self) -> EncodeResult:
        """Raises what was wrong with the unit, and `CorpusError` where the cluster gave it up."""
        engine = self._workers.engine
        while True:
            try:
                while not engine.is_done(self._ticket, WAIT_SECONDS):
                    pass
                return engine.result(self._ticket)
            except (GPTError, EncoderMismatchError):
                raise
            except Exception as error:  # Dask, Ray and Prefect have many
                self._send_again(error)

    def _send(self) -> None:
        self._is_task = self._workers.as_task
        try:
            self._ticket = self._workers.send(self._order)
        except Exception as error:
            raise _given_up(self._workers.data, self._order, error) from error

    def _send_again(self, error: Exception) -> None:
        if self._is_task and is_api_unreachable(error):
            self._workers.no_tasks()
        elif self._tries == MOST_TRIES:
            raise _given_up(self._workers.data, self._order, error) from error
        else:
            logger.warning("a unit was lost and is sent again: %s", _last_line(error))
            self._tries += 1
        self._send()


def _given_up(data: DataSection, order: EncodeRequest, error: Exception) -> CorpusError:
    rows = order.unit.rows
    unit = f"rows {rows.start} to {rows.stop} of {order.source.file.name}"
    rule = f"the {data.runner} cluster gave up {unit}: {_last_line(error)}"
    remedy = "look at the workers' logs (each needs this version of overnight, and memory for some "
    remedy += "hundred MB); then run again: finished units are kept"
    return CorpusError(Problem("data.cluster", data.cluster, rule, remedy))


def _last_line(error: BaseException) -> str:
    """Ray puts the worker's traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
