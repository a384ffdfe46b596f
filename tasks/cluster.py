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

import asyncio
import contextlib
import importlib.util
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol
from urllib.parse import urlsplit

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL, temporary_settings

from gpt.config import DataSection
from gpt.data.encoders import Mismatch
from gpt.data.engine import cpus
from gpt.data.orders import Cluster, Delivery, Order, encode_unit
from gpt.errors import ConfigError, CorpusError, GPTError, Problem
from tasks.prefect_api import is_away

UNITS_PER_WORKER = 2
"""On their way for each worker: the one it encodes, and the next."""
MOST_TRIES = 3
"""Times that a unit is sent. Dask and Ray have tried it four times by themselves each time."""
CONNECT_SECONDS = 10.0
SILENT = "what listens there does not answer as a cluster does"
COUNT_SECONDS = 5.0
"""How often the workers are counted: a cluster may grow."""
WAIT_SECONDS = 0.5
"""A signal is looked at so often while a unit is waited for."""
POLL_SECONDS = 0.01
LOCAL_STORE_BYTES = 64_000_000
"""For each worker of a Ray cluster on this machine: units that are done and wait."""
PORTS = {"dask": {"tcp": 8786, "tls": 8786, "": None}, "ray": {"ray": 10001, "": None}}
"""Of each scheme that an address may have, for addresses without one."""

logger = logging.getLogger(__name__)


@task(name="tokenize-unit", cache_policy=NO_CACHE, persist_result=False)
def tokenize_unit(order: Order) -> Delivery:
    """On a worker. Raises as `encode_unit` does."""
    return encode_unit(order)


class Engine(Protocol):
    """An open cluster, whichever kind it is. A ticket is what it gave for a unit it was sent."""

    def workers(self) -> int:
        """How many units it encodes at once."""

    def send_task(self, order: Order) -> Any: ...

    def send(self, order: Order) -> Any: ...

    def is_done(self, ticket: Any, seconds: float) -> bool:
        """Waits for so long."""

    def result(self, ticket: Any) -> Delivery:
        """Raises what the worker raised, or what the cluster does when it gives up."""


def cluster_of(data: DataSection) -> Cluster | None:
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
        _check_somebody_is_there(data.runner, data.cluster)
    open_engine = _dask if data.runner == "dask" else _ray
    return lambda: _opened(data, open_engine)


def _address_problem(address: str, rule: str) -> ConfigError:
    remedy = "start the cluster, or mend the address: tcp://host:8786 for Dask, ray://host:10001 "
    remedy += "or host:6379 for Ray; left empty, a cluster on this machine is started"
    return ConfigError(Problem("data.cluster", address, rule, remedy))


def _host_and_port(runner: str, address: str) -> tuple[str, int]:
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.scheme not in PORTS[runner]:
        raise _address_problem(address, f"{parts.scheme}:// is no address of {runner.capitalize()}")
    try:
        host, port = parts.hostname, parts.port or PORTS[runner][parts.scheme]
    except ValueError:  # no number
        host, port = None, None
    if not host or not port:
        raise _address_problem(address, "names no host and port")
    return host, port


def _check_somebody_is_there(runner: str, address: str) -> None:
    """Raises `ConfigError`. Asked by hand: Ray would try for half a minute, and end the process."""
    try:
        socket.create_connection(_host_and_port(runner, address), CONNECT_SECONDS).close()
    except OSError as error:
        rule = f"nobody answers there: {error.strerror or error}"
        raise _address_problem(address, rule) from error


@contextlib.contextmanager
def _opened(
    data: DataSection, open_engine: Callable[[DataSection], AbstractContextManager[Engine]]
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
    """The pool of `gpt.data.orders`; entered, it counts its workers."""

    def __init__(self, data: DataSection, engine: Engine) -> None:
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

    def submit(self, order: Order) -> _Unit:
        return _Unit(self, order)

    def send(self, order: Order) -> Any:
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

    def __init__(self, workers: _Workers, order: Order) -> None:
        self._workers, self._order = workers, order
        self._tries = 1
        self._send()

    def done(self) -> bool:
        # What is wrong, if anything is, `result` finds too.
        with contextlib.suppress(Exception):
            return self._workers.engine.is_done(self._ticket, 0.0)
        return False

    def result(self) -> Delivery:
        """Raises what was wrong with the unit, and `CorpusError` where the cluster gave it up."""
        engine = self._workers.engine
        while True:
            try:
                while not engine.is_done(self._ticket, WAIT_SECONDS):
                    pass
                return engine.result(self._ticket)
            except (GPTError, Mismatch):
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
        if self._is_task and is_away(error):
            self._workers.no_tasks()
        elif self._tries == MOST_TRIES:
            raise _given_up(self._workers.data, self._order, error) from error
        else:
            logger.warning("a unit was lost and is sent again: %s", _last_line(error))
            self._tries += 1
        self._send()


def _given_up(data: DataSection, order: Order, error: Exception) -> CorpusError:
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


# --- Dask ----------------------------------------------------------------------------------------


class _Dask:
    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def workers(self) -> int:
        return sum(self._runner.client.nthreads().values())

    def send_task(self, order: Order) -> Any:
        return self._runner.submit(tokenize_unit, {"order": order}).wrapped_future

    def send(self, order: Order) -> Any:
        # A client that is closed takes everything and does nothing.
        return self._runner.client.submit(encode_unit, order, pure=False)

    def is_done(self, ticket: Any, seconds: float) -> bool:
        if self._runner.client.status == "closed":
            raise ConnectionError("the connection to the scheduler is lost")
        until = time.monotonic() + seconds  # what Dask has for it asks for a client of the process
        while not ticket.done() and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return bool(ticket.done())

    def result(self, ticket: Any) -> Delivery:
        return _value(ticket.result())


def _check_a_scheduler_answers(address: str) -> None:
    """Raises `ConfigError`, and `OSError` where it is hung up on. Dask's client waits for a
    greeting without an end, and a page's port, as the dashboard's, says nothing unasked."""
    from distributed.comm.core import connect
    from distributed.security import Security

    async def greeted() -> None:
        arguments = Security().get_connection_args("client")
        comm = await connect(address, timeout=CONNECT_SECONDS, **arguments)
        await comm.close()

    try:
        asyncio.run(asyncio.wait_for(greeted(), CONNECT_SECONDS))
    except TimeoutError as error:
        raise _address_problem(address, SILENT) from error


@contextlib.contextmanager
def _dask(data: DataSection) -> Iterator[_Dask]:
    from prefect_dask import DaskTaskRunner

    if data.cluster:
        _check_a_scheduler_answers(data.cluster)
        runner = DaskTaskRunner(
            address=data.cluster, client_kwargs={"timeout": CONNECT_SECONDS, "name": "overnight"}
        )
    else:
        here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "threads_per_worker": 1}
        runner = DaskTaskRunner(cluster_kwargs={"n_workers": data.workers or cpus(), **here})
    with runner:
        assert runner.client  # opened when it is asked for
        yield _Dask(runner)


# --- Ray -----------------------------------------------------------------------------------------


class _Ray:
    def __init__(self, runner: Any) -> None:
        import ray

        self._runner = runner
        self._encode = ray.remote(encode_unit)

    def workers(self) -> int:
        import ray

        return int(ray.cluster_resources().get("CPU", 0))

    def send_task(self, order: Order) -> Any:
        return self._runner.submit(tokenize_unit, {"order": order}).wrapped_future

    def send(self, order: Order) -> Any:
        return self._encode.remote(order)

    def is_done(self, ticket: Any, seconds: float) -> bool:
        import ray

        return bool(ray.wait([ticket], timeout=seconds, fetch_local=False)[0])

    def result(self, ticket: Any) -> Delivery:
        import ray

        try:
            return _value(ray.get(ticket))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error


def _check_a_head_answers(address: str) -> None:
    """Raises `ConfigError`. Ray itself would try for two minutes, and print its attempts."""
    import grpc  # what a head speaks, at either of its ports

    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    host, port = _host_and_port("ray", address)
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
        except grpc.FutureTimeoutError as error:
            raise _address_problem(address, SILENT) from error


@contextlib.contextmanager
def _ray(data: DataSection) -> Iterator[_Ray]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from prefect_ray import RayTaskRunner

    if data.cluster:
        _check_a_head_answers(data.cluster)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not data.cluster:
        workers = data.workers or cpus()
        options |= {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": max(100_000_000, workers * LOCAL_STORE_BYTES),
            "_node_ip_address": "127.0.0.1",
        }
    with RayTaskRunner(address=data.cluster or "local", init_kwargs=options) as runner:
        yield _Ray(runner)


def _value(returned: Any) -> Delivery:
    """Of a Prefect task, which returns a state, or of the function itself."""
    if isinstance(returned, Delivery):
        return returned
    value: Delivery = returned.result(_sync=True)
    return value
