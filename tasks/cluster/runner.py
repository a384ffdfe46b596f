"""The units of a corpus on a Dask or Ray cluster, each a Prefect task run there.

The clusters are opened by the task runners of prefect-dask and prefect-ray; here and not as the
task runner of a flow, because tokenizing is a stage of several flows and also a command. Without a
flow run, or where a worker cannot reach Prefect's API (without which Prefect runs no task), the
same function is sent without its task: the API only displays the units.

Pending units are bounded by the number of workers. A finished unit waits on its worker, and only
the unit to be written next is fetched: this machine holds one at a time. Dask and Ray themselves
repeat what a lost worker was doing or had done; what they give up is submitted again here.
"""

import asyncio
import contextlib
import functools
import importlib.util
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings

from gpt.config.schema import DataSection
from gpt.data.tokenize.pool import available_cpus
from gpt.data.tokenize.requests import EncodeRequest, EncodeResult, OpenCluster, encode_unit
from gpt.data.tokenize.tokenizer import EncoderMismatchError
from gpt.errors import ConfigError, CorpusError, GPTError, Problem
from tasks.runtime.prefect_api import is_api_unreachable

UNITS_PER_WORKER = 2
"""Pending units per worker: the one it encodes, and the next."""
MAX_ATTEMPTS = 3
"""How often a unit is submitted. Dask and Ray themselves try it four times each time."""
COUNT_SECONDS = 5.0
"""Interval of counting the workers: a cluster may grow."""
WAIT_SECONDS = 0.5
"""Longest wait for a unit without handling signals."""
CONNECT_SECONDS = 10.0
POLL_SECONDS = 0.01
RAY_STORE_BYTES_PER_WORKER = 64_000_000
"""Object store of a Ray cluster on this machine: room for finished units that wait."""
PORTS = {"dask": {"tcp": 8786, "tls": 8786, "": None}, "ray": {"ray": 10001, "": None}}
"""The default port of each scheme that an address may have; "" is an address without one."""

logger = logging.getLogger(__name__)


@task(name="tokenize-unit", cache_policy=NO_CACHE, persist_result=False)
def tokenize_unit(request: EncodeRequest) -> EncodeResult:
    """`encode_unit` as a task; runs on a worker."""
    return encode_unit(request)


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
        try:
            socket.create_connection(_host_and_port(data), CONNECT_SECONDS).close()
        except OSError as error:
            rule = f"nothing answers there: {error.strerror or error}"
            raise _address_error(data, rule) from error
    return functools.partial(_open_pool, data)


def _host_and_port(data: DataSection) -> tuple[str, int]:
    parts = urlsplit(data.cluster if "://" in data.cluster else f"//{data.cluster}")
    ports = PORTS[data.runner]
    if parts.scheme not in ports:
        rule = f"{parts.scheme}:// is not a {data.runner.capitalize()} address"
        raise _address_error(data, rule)
    with contextlib.suppress(ValueError):  # the port is not a number
        if parts.hostname and (port := parts.port or ports[parts.scheme]):
            return parts.hostname, port
    raise _address_error(data, "has no host and port")


def _address_error(data: DataSection, rule: str) -> ConfigError:
    remedy = "start the cluster or correct the address, e.g. tcp://host:8786 for Dask, "
    remedy += "ray://host:10001 or host:6379 for Ray; leave it empty to start a cluster on this "
    remedy += "machine"
    return ConfigError(Problem("data.cluster", data.cluster, rule, remedy))


class _Pool:
    """The `Pool` of `gpt.data.tokenize.pool` for units. A job is what the cluster returns for a
    submitted unit."""

    runner: Any
    workers = 0

    def __init__(self, data: DataSection) -> None:
        self.data = data
        self.as_task = FlowRunContext.get() is not None

    def keep_counting(self, closed: threading.Event) -> None:
        while not closed.wait(COUNT_SECONDS):
            with contextlib.suppress(Exception):  # reported when a unit fails
                self.workers = self.count_workers()

    def make_task_runner(self) -> Any:
        """Return Prefect's task runner, not yet open. Raises `TimeoutError` if something else than
        a cluster listens at the address."""
        raise NotImplementedError

    def count_workers(self) -> int:
        """How many units the cluster encodes at once."""
        raise NotImplementedError

    def submit_plain(self, request: EncodeRequest) -> Any:
        """Submit the plain function."""
        raise NotImplementedError

    def wait(self, job: Any, seconds: float) -> bool:
        """Wait for at most `seconds`; whether the job is done."""
        raise NotImplementedError

    def fetch(self, job: Any) -> Any:
        """Raises what the worker raised, or the cluster's own error when it gives up."""
        raise NotImplementedError

    @property
    def max_pending(self) -> int:
        return UNITS_PER_WORKER * max(1, self.workers)

    def submit(self, request: EncodeRequest) -> Future[EncodeResult]:
        return _PendingUnit(self, request)


@contextlib.contextmanager
def _open_pool(data: DataSection) -> Iterator[_Pool]:
    pool = (_DaskPool if data.runner == "dask" else _RayPool)(data)
    with contextlib.ExitStack() as stack:
        try:
            pool.runner = stack.enter_context(pool.make_task_runner())
            pool.workers = pool.count_workers()
        except GPTError:
            raise
        except TimeoutError as error:  # of the handshake
            rule = "something listens there, but it does not answer as a cluster"
            raise _address_error(data, rule) from error
        except Exception as error:  # Dask and Ray raise many kinds
            rule = f"cannot open the {data.runner} cluster: {error}"
            remedy = "check that it is running, and that its versions of Python and of the "
            remedy += "packages are the same as here"
            raise ConfigError(Problem("data.cluster", data.cluster, rule, remedy)) from error
        if not pool.workers:
            logger.warning("the cluster at %s has no workers yet: waiting for some", data.cluster)
        closed = threading.Event()
        # In a thread: if the cluster is gone, Ray never returns.
        counter = threading.Thread(target=pool.keep_counting, args=(closed,), daemon=True)
        counter.start()
        stack.callback(counter.join, WAIT_SECONDS)
        stack.callback(closed.set)
        yield pool


class _DaskPool(_Pool):
    def make_task_runner(self) -> Any:
        from prefect_dask import DaskTaskRunner

        if address := self.data.cluster:
            asyncio.run(asyncio.wait_for(_greet_dask_scheduler(address), 2 * CONNECT_SECONDS))
            client = {"timeout": CONNECT_SECONDS, "name": "overnight"}
            return DaskTaskRunner(address=address, client_kwargs=client)
        local = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "threads_per_worker": 1}
        workers = self.data.workers or available_cpus()
        return DaskTaskRunner(cluster_kwargs={"n_workers": workers, **local})

    def count_workers(self) -> int:
        return sum(self.runner.client.nthreads().values())  # the property `client` opens it

    def submit_plain(self, request: EncodeRequest) -> Any:
        return self.runner.client.submit(encode_unit, request, pure=False)

    def wait(self, job: Any, seconds: float) -> bool:
        # A closed client would leave the job pending forever.
        if self.runner.client.status == "closed":
            raise ConnectionError("the connection to the scheduler is lost")
        deadline = time.monotonic() + seconds  # distributed.wait needs a process-wide client
        while not job.done() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return bool(job.done())

    def fetch(self, job: Any) -> Any:
        return job.result()


async def _greet_dask_scheduler(address: str) -> None:
    """Raises `OSError` or `TimeoutError`. Dask's client waits for a greeting without a limit, and a
    web server such as the dashboard never sends one."""
    from distributed.comm.core import connect
    from distributed.security import Security

    arguments = Security().get_connection_args("client")
    comm = await connect(address, timeout=CONNECT_SECONDS, **arguments)
    await comm.close()


class _RayPool(_Pool):
    def make_task_runner(self) -> Any:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
        from prefect_ray import RayTaskRunner

        self._ray, self._encode = ray, ray.remote(encode_unit)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.data.cluster:
            _greet_ray_head(self.data)
        else:
            workers = self.data.workers or available_cpus()
            options |= {
                "num_cpus": workers,
                "include_dashboard": False,
                "object_store_memory": max(100_000_000, workers * RAY_STORE_BYTES_PER_WORKER),
                "_node_ip_address": "127.0.0.1",
            }
        return RayTaskRunner(address=self.data.cluster or "local", init_kwargs=options)

    def count_workers(self) -> int:
        return int(self._ray.cluster_resources().get("CPU", 0))

    def submit_plain(self, request: EncodeRequest) -> Any:
        return self._encode.remote(request)

    def wait(self, job: Any, seconds: float) -> bool:
        return bool(self._ray.wait([job], timeout=seconds, fetch_local=False)[0])

    def fetch(self, job: Any) -> Any:
        try:
            return self._ray.get(job)
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error


def _greet_ray_head(data: DataSection) -> None:
    """Raises `TimeoutError`. Ray itself would try for two minutes and print each attempt."""
    import grpc  # the protocol of both ports of a head node

    if os.environ.get("RAY_USE_TLS", "0") == "0":
        host, port = _host_and_port(data)
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            try:
                grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
            except grpc.FutureTimeoutError as error:
                raise TimeoutError from error


class _PendingUnit(Future[EncodeResult]):
    """A submitted unit. Its result stays on the worker until it is asked for."""

    def __init__(self, pool: _Pool, request: EncodeRequest) -> None:
        super().__init__()
        self._pool, self._request = pool, request
        self._attempts = 1
        self._submit()

    def _submit(self) -> None:
        self._is_task = self._pool.as_task
        try:
            if self._is_task:
                with _prefect_api_url():
                    parameters = {"request": self._request}
                    self._job = self._pool.runner.submit(tokenize_unit, parameters).wrapped_future
            else:
                self._job = self._pool.submit_plain(self._request)
        except Exception as error:
            raise self._failure(error) from error

    def done(self) -> bool:
        with contextlib.suppress(Exception):  # `result` raises it
            return self._pool.wait(self._job, 0.0)
        return False

    def result(self, timeout: float | None = None) -> EncodeResult:
        """Wait for the unit, without a timeout. Raises what is wrong with the unit, and
        `CorpusError` where the cluster failed `MAX_ATTEMPTS` times."""
        while True:
            try:
                while not self._pool.wait(self._job, WAIT_SECONDS):
                    pass
                returned = self._pool.fetch(self._job)  # a task returns its state
                result: EncodeResult = returned.result(_sync=True) if self._is_task else returned
                return result
            except (GPTError, EncoderMismatchError):
                raise
            except Exception as error:  # Dask, Ray and Prefect raise many kinds
                self._submit_again(error)

    def _submit_again(self, error: Exception) -> None:
        if self._is_task and is_api_unreachable(error):
            if self._pool.as_task:
                logger.warning(
                    "the workers cannot reach Prefect's API: it will not display the units"
                )
            self._pool.as_task = False
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
