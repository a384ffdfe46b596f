"""The units of a corpus on a Dask or Ray cluster, each a Prefect task run there.

The clusters are opened by the task runners of prefect-dask and prefect-ray; here and not as the
task runner of a flow, because tokenizing is a stage of several flows and also a command. Without a
flow run, or where a worker cannot reach Prefect's API (without which Prefect runs no task), the
same function is sent without its task: the API only displays the units.

Pending units are bounded by the number of workers. A finished unit waits on its worker, and only
the unit to be written next is fetched: this machine holds one at a time. Dask and Ray themselves
repeat what a lost worker was doing or had done; what they give up is submitted again here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings

from gpt.config.schema import DataSection
from gpt.data.tokenize.encoders import EncoderMismatchError
from gpt.data.tokenize.requests import EncodeRequest, EncodeResult, OpenCluster
from gpt.errors import ConfigError, CorpusError, GPTError, Problem
from tasks.cluster.backends import ClusterBackend, check_reachable, open_dask, open_ray
from tasks.runtime.prefect_api import is_api_unreachable

UNITS_PER_WORKER = 2
"""Pending units per worker: the one it encodes, and the next."""
MAX_ATTEMPTS = 3
"""How often a unit is submitted. Dask and Ray themselves try it four times each time."""
COUNT_SECONDS = 5.0
"""Interval of counting the workers: a cluster may grow."""
WAIT_SECONDS = 0.5
"""Longest wait for a unit without handling signals."""

logger = logging.getLogger(__name__)


def resolve_cluster(data: DataSection) -> OpenCluster | None:
    """The cluster that [data] names, not yet opened; None for the processes of this machine.

    Raises `ConfigError` where its package is not installed or nothing answers at the address.
    """
    if data.runner == "local":
        return None
    package = f"prefect_{data.runner}"
    if importlib.util.find_spec(package) is None or importlib.util.find_spec(data.runner) is None:
        rule = f"{package.replace('_', '-')} is not installed"
        remedy = f"pip install 'overnight[{data.runner}]' here and on every worker, or remove "
        remedy += "data.runner"
        raise ConfigError(Problem("data.runner", data.runner, rule, remedy))
    if data.cluster:
        check_reachable(data.runner, data.cluster)
    return lambda: _open_cluster(data, open_dask if data.runner == "dask" else open_ray)


@contextlib.contextmanager
def _open_cluster(
    data: DataSection,
    open_backend: Callable[[DataSection], AbstractContextManager[ClusterBackend]],
) -> Iterator[_ClusterPool]:
    with contextlib.ExitStack() as stack:
        try:
            backend = stack.enter_context(open_backend(data))
        except GPTError:
            raise
        except Exception as error:  # Dask and Ray raise many kinds
            rule = f"cannot open the {data.runner} cluster: {error}"
            remedy = (
                "check that it is running, and that its versions of Python and of the packages "
            )
            remedy += "are the same as here"
            raise ConfigError(Problem("data.cluster", data.cluster, rule, remedy)) from error
        pool = _ClusterPool(data, backend)
        stack.callback(pool.close)
        yield pool


class _ClusterPool:
    """The `Pool` of `gpt.data.tokenize.pool` for units."""

    def __init__(self, data: DataSection, backend: ClusterBackend) -> None:
        self.data, self.backend = data, backend
        self.as_task = FlowRunContext.get() is not None
        self._workers = backend.count_workers()
        self._closed = threading.Event()
        # In a thread: if the cluster is gone, Ray never returns.
        self._counter = threading.Thread(target=self._count_workers, name="workers", daemon=True)
        self._counter.start()
        if not self._workers:
            logger.warning("the cluster at %s has no workers yet: waiting for some", data.cluster)

    def _count_workers(self) -> None:
        while not self._closed.wait(COUNT_SECONDS):
            with contextlib.suppress(Exception):  # reported when a unit fails
                self._workers = self.backend.count_workers()

    def close(self) -> None:
        self._closed.set()
        self._counter.join(WAIT_SECONDS)

    @property
    def max_pending(self) -> int:
        return UNITS_PER_WORKER * max(1, self._workers)

    def submit(self, request: EncodeRequest) -> Future[EncodeResult]:
        return _PendingUnit(self, request)

    def stop_using_tasks(self) -> None:
        if self.as_task:
            logger.warning("the workers cannot reach Prefect's API: it will not display the units")
        self.as_task = False


class _PendingUnit(Future[EncodeResult]):
    """A submitted unit. Its result stays on the worker until it is asked for."""

    def __init__(self, pool: _ClusterPool, request: EncodeRequest) -> None:
        super().__init__()
        self._pool, self._request = pool, request
        self._attempts = 1
        self._submit()

    def _submit(self) -> None:
        self._is_task = self._pool.as_task
        try:
            with _prefect_api_url() if self._is_task else contextlib.nullcontext():
                self._job = self._pool.backend.submit(self._request, self._is_task)
        except Exception as error:
            raise self._failure(error) from error

    def done(self) -> bool:
        with contextlib.suppress(Exception):  # `result` raises it
            return self._pool.backend.wait(self._job, 0.0)
        return False

    def result(self, timeout: float | None = None) -> EncodeResult:
        """Wait for the unit, without a timeout. Raises what is wrong with the unit, and
        `CorpusError` where the cluster failed `MAX_ATTEMPTS` times."""
        backend = self._pool.backend
        while True:
            try:
                while not backend.wait(self._job, WAIT_SECONDS):
                    pass
                return backend.result(self._job)
            except (GPTError, EncoderMismatchError):
                raise
            except Exception as error:  # Dask, Ray and Prefect raise many kinds
                self._submit_again(error)

    def _submit_again(self, error: Exception) -> None:
        if self._is_task and is_api_unreachable(error):
            self._pool.stop_using_tasks()
        elif self._attempts == MAX_ATTEMPTS:
            raise self._failure(error) from error
        else:
            logger.warning("a unit was lost and is submitted again: %s", _last_line(error))
            self._attempts += 1
        self._submit()

    def _failure(self, error: Exception) -> CorpusError:
        data, rows = self._pool.data, self._request.unit.rows
        unit = f"rows {rows.start} to {rows.stop} of {self._request.source.file.name}"
        rule = f"the {data.runner} cluster failed on {unit}: {_last_line(error)}"
        remedy = "read the workers' logs (each worker needs this version of overnight and a few "
        remedy += "hundred MB of memory); then run again: finished units are kept"
        return CorpusError(Problem("data.cluster", data.cluster, rule, remedy))


@contextlib.contextmanager
def _prefect_api_url() -> Iterator[None]:
    """Set the URL of Prefect's API, so that a task carries it to its worker: without one, every
    worker would start an API of its own."""
    if PREFECT_API_URL.value():
        yield
        return
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    with temporary_settings({PREFECT_API_URL: url}):
        yield


def _last_line(error: BaseException) -> str:
    """Ray puts the worker's traceback in front of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
