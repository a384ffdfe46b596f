"""Dask and Ray behind one interface, each opened by its Prefect task runner.

Whether a cluster answers at the address is checked before it is opened: by themselves, Dask would
wait forever and Ray for minutes.
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
NO_ANSWER = "something listens there, but it does not answer as a cluster"
POLL_SECONDS = 0.01
RAY_STORE_BYTES_PER_WORKER = 64_000_000
"""Object store of a Ray cluster on this machine: room for finished units that wait."""
PORTS = {"dask": {"tcp": 8786, "tls": 8786, "": None}, "ray": {"ray": 10001, "": None}}
"""The default port of each scheme that an address may have; "" is an address without one."""


@task(name="tokenize-unit", cache_policy=NO_CACHE, persist_result=False)
def tokenize_unit(request: EncodeRequest) -> EncodeResult:
    """`encode_unit` as a task; runs on a worker."""
    return encode_unit(request)


class ClusterBackend(Protocol):
    """An open cluster. A job is what it returns for a submitted unit."""

    def count_workers(self) -> int:
        """How many units it encodes at once."""

    def submit(self, request: EncodeRequest, as_task: bool) -> Any: ...

    def wait(self, job: Any, seconds: float) -> bool:
        """Wait for at most `seconds`; whether the job is done."""

    def result(self, job: Any) -> EncodeResult:
        """Raises what the worker raised, or the cluster's own error when it gives up."""


def _result_of(returned: Any) -> EncodeResult:
    """Unwrap the state that a Prefect task returns; the plain function returns the result."""
    if isinstance(returned, EncodeResult):
        return returned
    result: EncodeResult = returned.result(_sync=True)
    return result


# --- the address ---------------------------------------------------------------------------------


def _address_error(address: str, rule: str) -> ConfigError:
    remedy = "start the cluster or correct the address, e.g. tcp://host:8786 for Dask, "
    remedy += "ray://host:10001 or host:6379 for Ray; leave it empty to start a cluster on this "
    remedy += "machine"
    return ConfigError(Problem("data.cluster", address, rule, remedy))


def _host_and_port(runner: str, address: str) -> tuple[str, int]:
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.scheme not in PORTS[runner]:
        raise _address_error(address, f"{parts.scheme}:// is not a {runner.capitalize()} address")
    try:
        host, port = parts.hostname, parts.port or PORTS[runner][parts.scheme]
    except ValueError:  # the port is not a number
        host, port = None, None
    if not host or not port:
        raise _address_error(address, "has no host and port")
    return host, port


def check_reachable(runner: str, address: str) -> None:
    """Raises `ConfigError`. Ray itself would try for half a minute and then end the process."""
    try:
        socket.create_connection(_host_and_port(runner, address), CONNECT_SECONDS).close()
    except OSError as error:
        rule = f"nothing answers there: {error.strerror or error}"
        raise _address_error(address, rule) from error


# --- Dask ----------------------------------------------------------------------------------------


class _Dask:
    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def count_workers(self) -> int:
        return sum(self._runner.client.nthreads().values())

    def submit(self, request: EncodeRequest, as_task: bool) -> Any:
        if as_task:
            return self._runner.submit(tokenize_unit, {"request": request}).wrapped_future
        return self._runner.client.submit(encode_unit, request, pure=False)

    def wait(self, job: Any, seconds: float) -> bool:
        # A closed client would leave the job pending forever.
        if self._runner.client.status == "closed":
            raise ConnectionError("the connection to the scheduler is lost")
        deadline = time.monotonic() + seconds  # distributed.wait needs a process-wide client
        while not job.done() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return bool(job.done())

    def result(self, job: Any) -> EncodeResult:
        return _result_of(job.result())


def _check_dask_scheduler(address: str) -> None:
    """Raises `ConfigError`, and `OSError` where the connection is closed. Dask's client waits for a
    greeting without a limit, and a web server such as the dashboard never sends one."""
    from distributed.comm.core import connect
    from distributed.security import Security

    async def handshake() -> None:
        arguments = Security().get_connection_args("client")
        comm = await connect(address, timeout=CONNECT_SECONDS, **arguments)
        await comm.close()

    try:
        asyncio.run(asyncio.wait_for(handshake(), 2 * CONNECT_SECONDS))
    except TimeoutError as error:
        raise _address_error(address, NO_ANSWER) from error


@contextlib.contextmanager
def open_dask(data: DataSection) -> Iterator[ClusterBackend]:
    from prefect_dask import DaskTaskRunner

    if data.cluster:
        _check_dask_scheduler(data.cluster)
        runner = DaskTaskRunner(
            address=data.cluster, client_kwargs={"timeout": CONNECT_SECONDS, "name": "overnight"}
        )
    else:
        local = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "threads_per_worker": 1}
        workers = data.workers or available_cpus()
        runner = DaskTaskRunner(cluster_kwargs={"n_workers": workers, **local})
    with runner:
        assert runner.client  # the property opens it
        yield _Dask(runner)


# --- Ray -----------------------------------------------------------------------------------------


class _Ray:
    def __init__(self, runner: Any) -> None:
        import ray

        self._runner, self._ray = runner, ray
        self._encode = ray.remote(encode_unit)

    def count_workers(self) -> int:
        return int(self._ray.cluster_resources().get("CPU", 0))

    def submit(self, request: EncodeRequest, as_task: bool) -> Any:
        if as_task:
            return self._runner.submit(tokenize_unit, {"request": request}).wrapped_future
        return self._encode.remote(request)

    def wait(self, job: Any, seconds: float) -> bool:
        return bool(self._ray.wait([job], timeout=seconds, fetch_local=False)[0])

    def result(self, job: Any) -> EncodeResult:
        try:
            return _result_of(self._ray.get(job))
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from error


def _check_ray_head(address: str) -> None:
    """Raises `ConfigError`. Ray itself would try for two minutes and print each attempt."""
    import grpc  # the protocol of both ports of a head node

    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    host, port = _host_and_port("ray", address)
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
        except grpc.FutureTimeoutError as error:
            raise _address_error(address, NO_ANSWER) from error


@contextlib.contextmanager
def open_ray(data: DataSection) -> Iterator[ClusterBackend]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from prefect_ray import RayTaskRunner

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if data.cluster:
        _check_ray_head(data.cluster)
    else:
        workers = data.workers or available_cpus()
        options |= {
            "num_cpus": workers,
            "include_dashboard": False,
            "object_store_memory": max(100_000_000, workers * RAY_STORE_BYTES_PER_WORKER),
            "_node_ip_address": "127.0.0.1",
        }
    with RayTaskRunner(address=data.cluster or "local", init_kwargs=options) as runner:
        yield _Ray(runner)
