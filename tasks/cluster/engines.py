"""The two kinds of cluster, each opened by its Prefect task runner and asked for the same things.

Whether somebody is at an address, and whether that is a cluster, is asked before it is opened: left
to themselves, Dask waits for ever and Ray for minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, Protocol
from urllib.parse import urlsplit

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.config.schema import DataSection
from gpt.data.tokenize.pool import available_cpus
from gpt.data.tokenize.requests import EncodeRequest, EncodeResult, encode_unit
from gpt.errors import ConfigError, Problem

CONNECT_SECONDS = 10.0
SILENT = "what listens there does not answer as a cluster does"
POLL_SECONDS = 0.01
LOCAL_STORE_BYTES = 64_000_000
"""For each worker of a Ray cluster on this machine: units that are done and wait."""
PORTS = {"dask": {"tcp": 8786, "tls": 8786, "": None}, "ray": {"ray": 10001, "": None}}
"""Of each scheme that an address may have, for addresses without one."""


@task(name="tokenize-unit", cache_policy=NO_CACHE, persist_result=False)
def tokenize_unit(order: EncodeRequest) -> EncodeResult:
    """On a worker. Raises as `encode_unit` does."""
    return encode_unit(order)


class ClusterBackend(Protocol):
    """An open cluster, whichever kind it is. A ticket is what it gave for a unit it was sent."""

    def workers(self) -> int:
        """How many units it encodes at once."""

    def send_task(self, order: EncodeRequest) -> Any: ...

    def send(self, order: EncodeRequest) -> Any: ...

    def is_done(self, ticket: Any, seconds: float) -> bool:
        """Waits for so long."""

    def result(self, ticket: Any) -> EncodeResult:
        """Raises what the worker raised, or what the cluster does when it gives up."""


# --- the address ---------------------------------------------------------------------------------


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


def check_reachable(runner: str, address: str) -> None:
    """Raises `ConfigError`. Asked by hand: Ray would try for half a minute, and end the process."""
    try:
        socket.create_connection(_host_and_port(runner, address), CONNECT_SECONDS).close()
    except OSError as error:
        rule = f"nobody answers there: {error.strerror or error}"
        raise _address_problem(address, rule) from error


# --- Dask ----------------------------------------------------------------------------------------


class _Dask:
    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def workers(self) -> int:
        return sum(self._runner.client.nthreads().values())

    def send_task(self, order: EncodeRequest) -> Any:
        return self._runner.submit(tokenize_unit, {"order": order}).wrapped_future

    def send(self, order: EncodeRequest) -> Any:
        # A client that is closed takes everything and does nothing.
        return self._runner.client.submit(encode_unit, order, pure=False)

    def is_done(self, ticket: Any, seconds: float) -> bool:
        if self._runner.client.status == "closed":
            raise ConnectionError("the connection to the scheduler is lost")
        until = time.monotonic() + seconds  # what Dask has for it asks for a client of the process
        while not ticket.done() and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return bool(ticket.done())

    def result(self, ticket: Any) -> EncodeResult:
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
def open_dask(data: DataSection) -> Iterator[_Dask]:
    from prefect_dask import DaskTaskRunner

    if data.cluster:
        _check_a_scheduler_answers(data.cluster)
        runner = DaskTaskRunner(
            address=data.cluster, client_kwargs={"timeout": CONNECT_SECONDS, "name": "overnight"}
        )
    else:
        here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "threads_per_worker": 1}
        runner = DaskTaskRunner(
            cluster_kwargs={"n_workers": data.workers or available_cpus(), **here}
        )
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

    def send_task(self, order: EncodeRequest) -> Any:
        return self._runner.submit(tokenize_unit, {"order": order}).wrapped_future

    def send(self, order: EncodeRequest) -> Any:
        return self._encode.remote(order)

    def is_done(self, ticket: Any, seconds: float) -> bool:
        import ray

        return bool(ray.wait([ticket], timeout=seconds, fetch_local=False)[0])

    def result(self, ticket: Any) -> EncodeResult:
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
def open_ray(data: DataSection) -> Iterator[_Ray]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from prefect_ray import RayTaskRunner

    if data.cluster:
        _check_a_head_answers(data.cluster)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not data.cluster:
        workers = data.workers or available_cpus()
        options |= {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": max(100_000_000, workers * LOCAL_STORE_BYTES),
            "_node_ip_address": "127.0.0.1",
        }
    with RayTaskRunner(address=data.cluster or "local", init_kwargs=options) as runner:
        yield _Ray(runner)


def _value(returned: Any) -> EncodeResult:
    """Of a Prefect task, which returns a state, or of the function itself."""
    if isinstance(returned, EncodeResult):
        return returned
    value: EncodeResult = returned.result(_sync=True)
    return value
