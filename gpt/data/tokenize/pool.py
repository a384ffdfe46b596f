"""Run requests in parallel and return the results in order.

The pool of this machine encodes chunks in worker processes. A cluster is a pool too: it encodes
units (`gpt.data.tokenize.requests`). Only a few requests per worker are pending at any time, so
memory follows the number of workers alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from gpt.data.tokenize.encoders import (
    Chunk,
    EncodedChunk,
    Encoder,
    EngineName,
    encode_chunk,
)
from gpt.data.tokenize.worker import load_encoder
from gpt.errors import CorpusError, Problem

Item = TypeVar("Item")
Request = TypeVar("Request", contravariant=True)
Result = TypeVar("Result")
CHUNKS_PER_WORKER = 16
"""Pending chunks per worker: the one it encodes and some to go on with, so that reading continues
while the workers start or one of them is slow."""
GIGATOKEN_PACKAGE = "gigatoken"
STOP_SECONDS = 5.0
WORKER_ENVIRONMENT = {
    # numpy's BLAS would start threads, which do not survive a fork.
    "OPENBLAS_NUM_THREADS": "1",
    # glibc would return each chunk's arrays to the system, only to request them again.
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "67108864",
}


class Pool(Protocol[Request, Result]):
    """Runs several requests at once."""

    @property
    def max_pending(self) -> int:
        """How many requests may be pending."""

    def submit(self, request: Request, /) -> Future[Result]: ...


def map_in_order(
    pool: Pool[Request, Result], items: Iterable[tuple[Item, Request | None]]
) -> Iterator[tuple[Item, Result | None]]:
    """Pair every item with the result of its request (None: nothing to run), in the order of
    `items`.

    Items are drawn only as fast as requests finish. Raises what a request raised, in its place.
    """
    waiting: deque[tuple[Item, Future[Result] | None]] = deque()
    pending = 0
    for item, request in items:
        waiting.append((item, None if request is None else pool.submit(request)))
        pending += request is not None
        while waiting and (pending > pool.max_pending or _is_done(waiting[0][1])):
            first, future = waiting.popleft()
            pending -= future is not None
            yield first, future.result() if future else None
    for item, future in waiting:
        yield item, future.result() if future else None


def _is_done(future: Future[Result] | None) -> bool:
    return future is None or future.done()


# --- the pool of this machine --------------------------------------------------------------------


def available_cpus() -> int:
    """Count the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolve_engine(engine: str) -> EngineName:
    """Choose the encoder for `data.engine`. Raises `CorpusError` for gigatoken where it is not
    installed."""
    installed = importlib.util.find_spec(GIGATOKEN_PACKAGE) is not None
    if engine == "gigatoken" and not installed:
        remedy = "pip install 'overnight[turbo]', or set data.engine to auto or tiktoken"
        raise CorpusError(Problem("data.engine", engine, "gigatoken is not installed", remedy))
    return "gigatoken" if engine != "tiktoken" and installed else "tiktoken"


@contextlib.contextmanager
def open_pool(engine: EngineName, workers: int) -> Iterator[Pool[Chunk, EncodedChunk]]:
    """Start `workers` worker processes and stop them on exit; one worker is this process itself.

    The workers load their encoder while the first chunks are read.
    """
    if workers == 1:
        yield _InProcessPool(engine)
        return
    pool = _ProcessPool(engine, workers)
    try:
        yield pool
    finally:
        pool.close()


class _InProcessPool:
    """Encodes in this process, at once: for one worker, or too little text to start any."""

    max_pending = CHUNKS_PER_WORKER

    def __init__(self, engine: EngineName) -> None:
        self._engine = engine
        self._encoder: Encoder | None = None

    def submit(self, chunk: Chunk) -> Future[EncodedChunk]:
        future: Future[EncodedChunk] = Future()
        try:
            self._encoder = self._encoder or load_encoder(self._engine)
            future.set_result(encode_chunk(self._encoder, chunk))
        except Exception as error:
            future.set_exception(error)
        return future


class _ProcessPool:
    """One thread per worker process; it sends a chunk and waits for the ids."""

    def __init__(self, engine: EngineName, workers: int) -> None:
        self.max_pending = CHUNKS_PER_WORKER * workers
        self._process, self._sockets = _start_workers(engine, workers)
        self._idle: queue.SimpleQueue[io.BufferedRWPair] = queue.SimpleQueue()
        for each in self._sockets:
            self._idle.put(each.makefile("rwb"))
        self._threads = ThreadPoolExecutor(workers, "tokenize")

    def submit(self, chunk: Chunk) -> Future[EncodedChunk]:
        return self._threads.submit(self._encode, chunk)

    def _encode(self, chunk: Chunk) -> EncodedChunk:
        worker = self._idle.get()
        try:
            pickle.dump(chunk, worker, pickle.HIGHEST_PROTOCOL)
            worker.flush()
            answer: EncodedChunk | Exception = pickle.load(worker)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise _worker_died(self._process) from error
        finally:
            self._idle.put(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Stop the workers. One that does not finish its chunk in time is killed."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for each in self._sockets:
            with contextlib.suppress(OSError):  # the worker has exited
                each.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._threads.shutdown(wait=True)
        for each in self._sockets:
            each.close()


def _start_workers(
    engine: EngineName, workers: int
) -> tuple[subprocess.Popen[bytes], tuple[socket.socket, ...]]:
    """Start the program of `gpt.data.tokenize.worker`, with a socket to each of its workers."""
    ours, theirs = zip(*(socket.socketpair() for _ in range(workers)), strict=True)
    descriptors = [each.fileno() for each in theirs]
    # -c and not -m: the parent's own sys.path decides which gpt is imported, wherever it runs.
    program = "import sys; sys.path[:] = sys.argv.pop().split('\\n'); "
    program += "from gpt.data.tokenize.worker import main; main()"
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program, engine, *map(str, descriptors), "\n".join(sys.path)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a library prints is not part of our output
            pass_fds=descriptors,
            env=os.environ | WORKER_ENVIRONMENT,
            start_new_session=True,  # Ctrl-C is for this process, which then stops all of them
        )
    finally:
        for each in theirs:
            each.close()
    return process, ours


def _worker_died(process: subprocess.Popen[bytes]) -> CorpusError:
    try:
        code = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        code = 0
    rule = f"died while encoding (exit status {code})"
    remedy = "run again: finished units are kept. Status -9 usually means that memory ran out: "
    remedy += "lower data.workers"
    return CorpusError(Problem("tokenizing process", str(process.pid), rule, remedy))
