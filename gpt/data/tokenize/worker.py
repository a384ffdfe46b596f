"""Tokenising processes: chunks in by one pipe, ids out by another.

A program of its own and not a fork of the parent or a `multiprocessing` child: whatever threads,
CUDA contexts or main module the parent has stay there, and nothing is imported but numpy and the
encoder (about 80 MB). It loads these once, forks a process for each pair of pipes, and waits for
them; so one start is paid for and not one a worker. When the parent dies, by any signal, the pipes
end and so do all of them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import traceback
from typing import IO, Literal

import numpy as np

from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.encoders import (
    Chunk,
    Encoded,
    Encoder,
    EncoderMismatchError,
    EngineName,
    TiktokenEncoder,
    encode_chunk,
)

Failure = Literal["mismatch", "error"]


class PipeClosed(Exception):  # noqa: N818 - the ordinary end of a conversation
    """The other side is gone."""


def load_encoder(engine: EngineName) -> Encoder:
    """Load what the engine needs; 0.2 to 0.5 s."""
    tokenizer.load_tokenizer()
    if engine == "gigatoken":
        from gpt.data.tokenize.gigatoken_encoder import GigatokenEncoder

        return GigatokenEncoder()
    return TiktokenEncoder()


def send_chunk(pipe: IO[bytes], chunk: Chunk) -> None:
    _put(pipe, chunk.lengths, chunk.starts.astype("<u8"), chunk.text)


def receive_chunk(pipe: IO[bytes]) -> Chunk:
    """Raises `PipeClosed`."""
    lengths, starts, text = (_get(pipe) for _ in range(3))
    return Chunk(
        bytes(text), np.frombuffer(lengths, "<u8"), np.frombuffer(starts, "<u8").astype(bool)
    )


def send_encoded(pipe: IO[bytes], encoded: Encoded) -> None:
    _put(pipe, b"ok", encoded.counts, encoded.ids)


def send_failure(pipe: IO[bytes], kind: Failure, text: str) -> None:
    _put(pipe, kind.encode(), b"", text.encode())


def receive_encoded(pipe: IO[bytes]) -> Encoded:
    """Raises `PipeClosed`, `EncoderMismatchError`, and `RuntimeError` with the worker's own
    traceback."""
    status, counts, ids = (_get(pipe) for _ in range(3))
    if status == b"mismatch":
        raise EncoderMismatchError(ids.decode())
    if status == b"error":
        raise RuntimeError(f"in a tokenising worker:\n{ids.decode()}")
    return Encoded(np.frombuffer(ids, "<u2"), np.frombuffer(counts, "<u8"))


def _put(pipe: IO[bytes], *fields: bytes | np.ndarray) -> None:
    for field in fields:
        size = field.nbytes if isinstance(field, np.ndarray) else len(field)
        pipe.write(size.to_bytes(8, "little"))
        pipe.write(field)  # type: ignore[arg-type]
    pipe.flush()


def _get(pipe: IO[bytes]) -> bytearray:
    field = bytearray(int.from_bytes(_filled(pipe, bytearray(8)), "little"))
    return _filled(pipe, field)


def _filled(pipe: IO[bytes], field: bytearray) -> bytearray:
    view = memoryview(field)
    while view:
        count = pipe.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise PipeClosed
        view = view[count:]
    return field


def serve(
    engine: EngineName, encoder: Encoder | None, incoming: IO[bytes], outgoing: IO[bytes]
) -> None:
    """Answer chunks until the other side is gone."""
    try:
        while True:
            chunk = receive_chunk(incoming)
            try:
                encoder = encoder or load_encoder(engine)
                encoded = encode_chunk(encoder, chunk)
            except EncoderMismatchError as difference:
                send_failure(outgoing, "mismatch", str(difference))
            except Exception:
                send_failure(outgoing, "error", traceback.format_exc())
            else:
                send_encoded(outgoing, encoded)
    except (PipeClosed, BrokenPipeError):
        pass


# --- the program ---------------------------------------------------------------------------------


def main() -> None:
    """Arguments: the engine, then for each worker a descriptor to read from and one to write to,
    as in `5,8`."""
    # Ctrl-C goes to the whole group: the parent decides, and ends this by closing the pipes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    engine: EngineName = "gigatoken" if sys.argv[1] == "gigatoken" else "tiktoken"
    pipes = [tuple(map(int, pair.split(","))) for pair in sys.argv[2:]]
    encoder = None
    with contextlib.suppress(Exception):  # told with the first chunk, for which it is tried again
        encoder = load_encoder(engine)
    gc.freeze()  # a collection would write to pages that the workers share
    workers: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: _kill(workers))
    for mine in pipes:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _work(engine, encoder, mine, [fd for pair in pipes for fd in pair if fd not in mine])
        workers.append(pid)
        for descriptor in mine:
            os.close(descriptor)
    _end_as_they_do(workers)


def _work(
    engine: EngineName, encoder: Encoder | None, mine: tuple[int, ...], others: list[int]
) -> None:
    """The whole life of a worker; does not return."""
    for descriptor in others:
        with contextlib.suppress(OSError):  # closed before this worker was forked
            os.close(descriptor)
    try:
        with os.fdopen(mine[0], "rb") as incoming, os.fdopen(mine[1], "wb") as outgoing:
            serve(engine, encoder, incoming, outgoing)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _end_as_they_do(workers: list[int]) -> None:
    """Wait for the workers. One that ends badly ends all, and its status becomes that of this
    process, where the parent looks for it."""
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
        with contextlib.suppress(ProcessLookupError):  # ended, and not yet struck off
            os.kill(pid, signal.SIGKILL)
