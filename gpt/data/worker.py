"""One tokenising process: chunks in on standard input, ids out on standard output.

A program of its own and not a fork or a `multiprocessing` child: whatever threads, CUDA contexts
or main module the parent has stay there, nothing is imported but numpy and the encoder (about
80 MB), and when the parent dies, by any signal, the pipe ends and so does the worker.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import IO, Literal

import numpy as np

from gpt.data import tokenizer
from gpt.data.encoders import (
    Chunk,
    Encoded,
    Encoder,
    EngineName,
    Mismatch,
    TiktokenEncoder,
    encode_chunk,
)

Failure = Literal["mismatch", "error"]


class PipeClosed(Exception):  # noqa: N818 - the ordinary end of a conversation
    """The other side is gone."""


def open_encoder(engine: EngineName) -> Encoder:
    """Load what the engine needs; 0.2 to 0.5 s."""
    tokenizer.load_tokenizer()
    if engine == "gigatoken":
        from gpt.data.turbo import CheckedGigatoken

        return CheckedGigatoken()
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
    """Raises `PipeClosed`, `Mismatch`, and `RuntimeError` with the worker's own traceback."""
    status, counts, ids = (_get(pipe) for _ in range(3))
    if status == b"mismatch":
        raise Mismatch(ids.decode())
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


def serve(engine: EngineName, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
    """Answer chunks until the other side is gone."""
    encoder = None
    try:
        while True:
            chunk = receive_chunk(incoming)
            try:
                encoder = encoder or open_encoder(engine)
                encoded = encode_chunk(encoder, chunk)
            except Mismatch as difference:
                send_failure(outgoing, "mismatch", str(difference))
            except Exception:
                send_failure(outgoing, "error", traceback.format_exc())
            else:
                send_encoded(outgoing, encoded)
    except (PipeClosed, BrokenPipeError):
        pass


def main() -> None:
    # Ctrl-C goes to the whole group: the parent decides, and ends this by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as out, os.fdopen(os.dup(0), "rb") as source:
        os.dup2(2, 1)  # what a library prints must not get between the ids
        engine: EngineName = "gigatoken" if sys.argv[1] == "gigatoken" else "tiktoken"
        serve(engine, source, out)


if __name__ == "__main__":
    main()
