"""Worker processes: chunks in through one pipe, ids out through another.

The workers are a program of their own, neither a fork of the parent nor a `multiprocessing` child:
the parent's threads, CUDA contexts and main module stay out of it, and only numpy and the encoder
are imported (about 80 MB). The program loads these once, forks one process per pair of pipes and
waits for them, so the start is paid once and not per worker. When the parent dies, by any signal,
the pipes close and all of them exit.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import traceback
from typing import IO

import numpy as np

from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.encoders import (
    PART,
    Chunk,
    EncodedChunk,
    Encoder,
    EncoderMismatchError,
    EngineName,
    TiktokenEncoder,
    encode_chunk,
)


class PipeClosedError(Exception):
    """The other side has closed its pipe: the ordinary end."""


def load_encoder(engine: EngineName) -> Encoder:
    """Load the ranks and the engine; takes 0.2 to 0.5 s."""
    tokenizer.load_tokenizer()
    if engine == "gigatoken":
        from gpt.data.tokenize.gigatoken_encoder import GigatokenEncoder

        return GigatokenEncoder()
    return TiktokenEncoder()


def send_chunk(pipe: IO[bytes], chunk: Chunk) -> None:
    _send(pipe, chunk.parts.tobytes(), chunk.text)


def receive_chunk(pipe: IO[bytes]) -> Chunk:
    """Raises `PipeClosedError`."""
    parts, text = _receive(pipe), _receive(pipe)
    return Chunk(bytes(text), np.frombuffer(parts, PART))


def send_encoded(pipe: IO[bytes], encoded: EncodedChunk) -> None:
    _send(pipe, b"ok", encoded.parts.tobytes(), encoded.ids.tobytes())


def receive_encoded(pipe: IO[bytes], chunk: Chunk) -> EncodedChunk:
    """Raises `PipeClosedError`, `EncoderMismatchError`, and `RuntimeError` with the worker's own
    traceback."""
    status, parts, content = (_receive(pipe) for _ in range(3))
    if status == b"mismatch":
        raise EncoderMismatchError(content.decode())
    if status == b"error":
        raise RuntimeError(f"in a tokenizing worker:\n{content.decode()}")
    return chunk.with_ids(np.frombuffer(content, "<u2"), np.frombuffer(parts, PART))


def _send(pipe: IO[bytes], *fields: bytes) -> None:
    for field in fields:
        pipe.write(len(field).to_bytes(8, "little"))
        pipe.write(field)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytearray:
    return _fill(pipe, bytearray(int.from_bytes(_fill(pipe, bytearray(8)), "little")))


def _fill(pipe: IO[bytes], field: bytearray) -> bytearray:
    view = memoryview(field)
    while view:
        count = pipe.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise PipeClosedError
        view = view[count:]
    return field


# --- the program ---------------------------------------------------------------------------------


def main() -> None:
    """Run the workers. Arguments: the engine, then per worker the descriptors to read from and to
    write to, e.g. `5,8`."""
    # Ctrl-C reaches the whole process group; the parent decides and closes the pipes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine: EngineName = "gigatoken" if sys.argv[1] == "gigatoken" else "tiktoken"
    pipes = [tuple(map(int, pair.split(","))) for pair in sys.argv[2:]]
    encoder = None
    with contextlib.suppress(Exception):  # reported with the first chunk, which tries again
        encoder = load_encoder(engine)
    gc.freeze()  # a collection would write to pages that the workers share
    workers: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: _kill(workers))
    for own in pipes:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            others = [fd for pair in pipes for fd in pair if fd not in own]
            _run_worker(engine, encoder, own, others)
        workers.append(pid)
        for descriptor in own:
            os.close(descriptor)
    _wait_for(workers)


def _run_worker(
    engine: EngineName, encoder: Encoder | None, own: tuple[int, ...], others: list[int]
) -> None:
    """Answer chunks until the parent closes the pipe, then exit; does not return."""
    for descriptor in others:
        with contextlib.suppress(OSError):  # closed before this worker was forked
            os.close(descriptor)
    try:
        with (
            contextlib.suppress(PipeClosedError, BrokenPipeError),
            os.fdopen(own[0], "rb") as incoming,
            os.fdopen(own[1], "wb") as outgoing,
        ):
            while True:
                encoder = _answer(engine, encoder, incoming, outgoing)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _answer(
    engine: EngineName, encoder: Encoder | None, incoming: IO[bytes], outgoing: IO[bytes]
) -> Encoder | None:
    """Encode one chunk. Returns the encoder, loaded if it was not."""
    chunk = receive_chunk(incoming)
    try:
        encoder = encoder or load_encoder(engine)
        encoded = encode_chunk(encoder, chunk)
    except EncoderMismatchError as difference:
        _send(outgoing, b"mismatch", b"", str(difference).encode())
    except Exception:
        _send(outgoing, b"error", b"", traceback.format_exc().encode())
    else:
        send_encoded(outgoing, encoded)
    return encoder


def _wait_for(workers: list[int]) -> None:
    """Wait for the workers to exit. If one fails, kill the others and exit with its status, where
    the parent looks for it."""
    while workers:
        pid, status = os.wait()
        workers.remove(pid)
        if status:
            _kill(workers)
            for other in workers:
                os.waitpid(other, 0)
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), -code)
            sys.exit(code)


def _kill(workers: list[int]) -> None:
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):  # it has exited already
            os.kill(pid, signal.SIGKILL)
