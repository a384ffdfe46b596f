"""Worker processes: pickled chunks in, encoded chunks out, through one socket per worker.

The workers are a program of their own, neither a fork of the parent nor a `multiprocessing` child:
the parent's threads, CUDA contexts and main module stay out of it, and only numpy and the encoder
are imported (about 80 MB). The program loads these once, forks one process per socket and waits for
them, so the start is paid once and not per worker. When the parent dies, by any signal, the sockets
close and all of them exit.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import sys
import traceback

from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.encoders import (
    EncodedChunk,
    Encoder,
    EncoderMismatchError,
    EngineName,
    TiktokenEncoder,
    encode_chunk,
)


def load_encoder(engine: EngineName) -> Encoder:
    """Load the ranks and the engine; takes 0.2 to 0.5 s."""
    tokenizer.load_tokenizer()
    if engine == "gigatoken":
        from gpt.data.tokenize.gigatoken_encoder import GigatokenEncoder

        return GigatokenEncoder()
    return TiktokenEncoder()


def main() -> None:
    """Run the workers. Arguments: the engine, then the descriptor of each worker's socket."""
    engine: EngineName = "gigatoken" if sys.argv[1] == "gigatoken" else "tiktoken"
    descriptors = [int(descriptor) for descriptor in sys.argv[2:]]
    encoder = None
    with contextlib.suppress(Exception):  # reported with the first chunk, which tries again
        encoder = load_encoder(engine)
    gc.freeze()  # a collection would write to pages that the workers share
    workers: list[int] = []
    while descriptors:
        pid = os.fork()
        if not pid:
            _run_worker(engine, encoder, *descriptors)
        workers.append(pid)
        os.close(descriptors.pop(0))
    while workers:
        pid, status = os.wait()
        workers.remove(pid)
        if status:
            _fail(os.waitstatus_to_exitcode(status), workers)


def _fail(code: int, others: list[int]) -> None:
    """Kill the other workers and end as the failed one did: the parent reads the exit status."""
    for pid in others:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _run_worker(engine: EngineName, encoder: Encoder | None, own: int, *others: int) -> None:
    """Answer chunks until the parent closes the socket, then exit; does not return."""
    for descriptor in others:
        os.close(descriptor)
    try:
        stream = socket.socket(fileno=own).makefile("rwb")
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                chunk = pickle.load(stream)
                answer: EncodedChunk | Exception
                try:
                    encoder = encoder or load_encoder(engine)
                    answer = encode_chunk(encoder, chunk)
                except EncoderMismatchError as mismatch:
                    answer = mismatch
                except Exception:
                    answer = RuntimeError(f"in a tokenizing worker:\n{traceback.format_exc()}")
                pickle.dump(answer, stream, pickle.HIGHEST_PROTOCOL)
                stream.flush()
                del chunk, answer  # free before the next chunk arrives
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
