"""Chunks to ids by several processes at once, given back in the order in which they came.

What is on its way at any moment is a few chunks a worker and nothing else, so memory follows the
number of workers alone. The workers of a cluster are a `Pool` too (`gpt.data.tokenize.requests`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, NamedTuple, Protocol, TypeVar

from gpt.data.tokenize.encoders import Chunk, Encoded, Encoder, EngineName, encode_chunk
from gpt.data.tokenize.worker import PipeClosed, load_encoder, receive_encoded, send_chunk
from gpt.errors import CorpusError, Problem

T = TypeVar("T")
Work = TypeVar("Work", contravariant=True)
Done = TypeVar("Done", covariant=True)
Sent = TypeVar("Sent")
Got = TypeVar("Got")
CHUNKS_PER_WORKER = 16
"""On their way for each worker: the one it encodes, and some to take next, so that what is read
while the workers start, or while one of them is slow, is there for them."""
GIGATOKEN_PACKAGE = "gigatoken"
STOP_SECONDS = 5.0
WORKER_ENVIRONMENT = {
    # numpy's library would start threads, which a fork does not take along.
    "OPENBLAS_NUM_THREADS": "1",
    # glibc would give the arrays of each chunk back to the system, to ask for them again.
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "67108864",
}
PIPE_BYTES = 1 << 20
"""A whole chunk, so that its writer does not wait for its reader; Linux only."""


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resolve_engine(asked: str) -> EngineName:
    """Raises `CorpusError` where gigatoken is asked for and not installed."""
    installed = importlib.util.find_spec(GIGATOKEN_PACKAGE) is not None
    if asked == "gigatoken" and not installed:
        remedy = "pip install 'overnight[turbo]', or set data.engine to auto or tiktoken"
        raise CorpusError(Problem("data.engine", asked, "gigatoken is not installed", remedy))
    return "gigatoken" if asked != "tiktoken" and installed else "tiktoken"


class Coming(Protocol[Done]):
    """What a pool has been given to do."""

    def done(self) -> bool: ...

    def result(self) -> Done:
        """Waits. Raises what went wrong."""


class Pool(Protocol[Work, Done]):
    """Does what it is given, several at once."""

    @property
    def ahead(self) -> int:
        """How much may be on its way."""

    def submit(self, work: Work, /) -> Coming[Done]: ...


class _Here:
    """Encodes in this process, at once: for one worker, or too little text to start any."""

    ahead = CHUNKS_PER_WORKER

    def __init__(self, engine: EngineName) -> None:
        self._engine = engine
        self._encoder: Encoder | None = None

    def submit(self, chunk: Chunk) -> Future[Encoded]:
        future: Future[Encoded] = Future()
        try:
            self._encoder = self._encoder or load_encoder(self._engine)
            future.set_result(encode_chunk(self._encoder, chunk))
        except Exception as error:
            future.set_exception(error)
        return future


class _Worker(NamedTuple):
    """The two pipes of a worker process."""

    chunks: IO[bytes]
    ids: IO[bytes]


class _Processes:
    """A thread for each worker process; it writes a chunk, waits, and reads the ids."""

    def __init__(self, engine: EngineName, workers: int) -> None:
        self.ahead = CHUNKS_PER_WORKER * workers
        self._program, self._started = _start(engine, workers)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._started:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, "tokenise")

    def submit(self, chunk: Chunk) -> Future[Encoded]:
        return self._threads.submit(self._encode, chunk)

    def _encode(self, chunk: Chunk) -> Encoded:
        worker = self._idle.get()
        try:
            send_chunk(worker.chunks, chunk)
            return receive_encoded(worker.ids)
        except (PipeClosed, OSError) as error:
            raise _died(self._program) from error
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers; what they were doing is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._program.terminate()  # it kills its workers
        self._threads.shutdown(wait=True)
        self._program.wait(STOP_SECONDS)
        for worker in self._started:
            for pipe in worker:
                with contextlib.suppress(OSError):
                    pipe.close()


def _start(engine: EngineName, workers: int) -> tuple[subprocess.Popen[bytes], list[_Worker]]:
    """The program of `gpt.data.tokenize.worker`, and a pair of pipes to each of its workers."""
    theirs: list[tuple[int, int]] = []
    ours = []
    for _ in range(workers):
        chunks_out, chunks_in = _pipe()
        ids_out, ids_in = _pipe()
        theirs.append((chunks_out, ids_in))
        ours.append(_Worker(os.fdopen(chunks_in, "wb"), os.fdopen(ids_out, "rb")))
    # -c and not -m: the parent's own sys.path decides which gpt is imported, wherever it runs.
    program = "import sys; sys.path[:] = sys.argv.pop().split('\\n'); "
    program += "from gpt.data.tokenize.worker import main; main()"
    pairs = [f"{incoming},{outgoing}" for incoming, outgoing in theirs]
    descriptors = [descriptor for pair in theirs for descriptor in pair]
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program, engine, *pairs, "\n".join(sys.path)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a library prints is not our output
            pass_fds=descriptors,
            env=os.environ | WORKER_ENVIRONMENT,
        )
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return process, ours


def _pipe() -> tuple[int, int]:
    ends = os.pipe()
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):  # more than a user may have
            fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return ends


def _died(process: subprocess.Popen[bytes]) -> CorpusError:
    try:
        code = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        code = 0
    rule = f"ended in the middle of its work (exit status {code})"
    remedy = "run again: what was finished is kept; with status -9 the memory may have run out, "
    remedy += "then lower data.workers"
    return CorpusError(Problem("a tokenising process", str(process.pid), rule, remedy))


@contextlib.contextmanager
def open_pool(engine: EngineName, workers: int) -> Iterator[Pool[Chunk, Encoded]]:
    """Workers for the length of the context; none is left behind, also after an error. They load
    what they need while the first chunks are read."""
    if workers == 1:
        yield _Here(engine)
        return
    pool = _Processes(engine, workers)
    try:
        yield pool
    finally:
        pool.close()


def map_in_order(
    pool: Pool[Sent, Got], items: Iterable[T], work_of: Callable[[T], Sent | None]
) -> Iterator[tuple[T, Got | None]]:
    """Every item with what came of its work (of a chunk, its ids), if it has any, in the order of
    `items`.

    Items are drawn only as fast as they are done. Raises what a worker raised, at its place.
    """
    waiting: deque[tuple[T, Coming[Got] | None]] = deque()
    coming = 0
    for item in items:
        work = work_of(item)
        waiting.append((item, None if work is None else pool.submit(work)))
        coming += work is not None
        while waiting and (coming > pool.ahead or _is_done(waiting[0][1])):
            first, future = waiting.popleft()
            coming -= future is not None
            yield first, future.result() if future else None
    for item, future in waiting:
        yield item, future.result() if future else None


def _is_done(future: Coming[Got] | None) -> bool:
    return future is None or future.done()
