"""Run requests in parallel and return the results in order.

The pool of this machine encodes chunks in worker processes. A cluster is a pool too: it encodes
units (`gpt.data.tokenize.requests`). Only a few requests per worker are pending at any time, so
memory follows the number of workers alone.
"""

import contextlib
import io
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gpt.data.tokenize.encoders import Chunk, EncodedChunk, EngineName, encode_chunk
from gpt.errors import CorpusError, Problem

Item = TypeVar("Item")
Request = TypeVar("Request", contravariant=True)
Result = TypeVar("Result")
CHUNKS_PER_WORKER = 16
"""Pending chunks per worker: the one it encodes and some to go on with, so that reading continues
while the workers start or one of them is slow."""
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


def available_cpus() -> int:
    """Count the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class _LocalPool:
    """Threads that encode a chunk each, or wait for a worker process that does."""

    submit: Callable[[Chunk], Future[EncodedChunk]]
    max_pending: int


@contextlib.contextmanager
def open_pool(engine: EngineName, workers: int) -> Iterator[Pool[Chunk, EncodedChunk]]:
    """Start `workers` worker processes and stop them on exit; one worker is a thread of this
    process. The workers load their encoder while the first chunks are read."""
    threads = ThreadPoolExecutor(workers, "tokenize")
    try:
        if workers == 1:
            yield _LocalPool(lambda chunk: threads.submit(encode_chunk, engine, chunk), 1)
            return
        with _worker_processes(engine, workers, threads) as encode:
            yield _LocalPool(
                lambda chunk: threads.submit(encode, chunk), CHUNKS_PER_WORKER * workers
            )
    finally:
        threads.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _worker_processes(
    engine: EngineName, workers: int, threads: ThreadPoolExecutor
) -> Iterator[Callable[[Chunk], EncodedChunk]]:
    """Yield a function that sends a chunk to an idle worker and waits for the ids. On exit, a
    worker that does not finish its chunk in time is killed."""
    process, sockets = _start_workers(engine, workers)
    idle: queue.SimpleQueue[io.BufferedRWPair] = queue.SimpleQueue()
    for each in sockets:
        idle.put(each.makefile("rwb"))

    def encode(chunk: Chunk) -> EncodedChunk:
        worker = idle.get()
        try:
            pickle.dump(chunk, worker, pickle.HIGHEST_PROTOCOL)
            worker.flush()
            answer: EncodedChunk | Exception = pickle.load(worker)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise _worker_died(process) from error
        finally:
            idle.put(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer

    try:
        yield encode
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for each in sockets:
            with contextlib.suppress(OSError):  # the worker has exited
                each.shutdown(socket.SHUT_RDWR)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for each in sockets:
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
