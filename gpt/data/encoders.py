"""A chunk of text to ids: what one worker does, whichever process it runs in.

Chunks are plain buffers, so that they cross a pipe as they are. Nothing here imports more than
numpy and the encoder that is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt.data import tokenizer

EngineName = Literal["tiktoken", "gigatoken"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Parts of documents, end to end. `starts` tells which parts begin a document."""

    text: bytes
    lengths: NDArray[np.uint64]
    starts: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Encoded:
    """The ids of a chunk, an end-of-text before each part that begins a document. `counts` holds
    the ids of each part, its end-of-text among them."""

    ids: NDArray[np.uint16]
    counts: NDArray[np.uint64]


class Mismatch(Exception):  # noqa: N818 - no fault of anyone's: the signal to fall back
    """The faster encoder gave other ids than tiktoken; says where."""


class Encoder(Protocol):
    def parts(self, texts: list[bytes]) -> list[NDArray[Any]]:
        """The ids of each text, which is whole UTF-8. Raises `Mismatch`."""


class TiktokenEncoder:
    def parts(self, texts: list[bytes]) -> list[NDArray[Any]]:
        return [tokenizer.encode(text.decode()) for text in texts]


def open_encoder(engine: EngineName) -> Encoder:
    """Load what the engine needs; 0.2 to 0.5 s."""
    tokenizer.load_tokenizer()
    if engine == "gigatoken":
        from gpt.data.turbo import CheckedGigatoken

        return CheckedGigatoken()
    return TiktokenEncoder()


def encode_chunk(encoder: Encoder, chunk: Chunk) -> Encoded:
    """Depends on the chunk's text alone. Raises `Mismatch`, and `ValueError` for an id that is no
    token of GPT-2's (uint16 would hide it)."""
    ends = np.cumsum(chunk.lengths, dtype=np.int64).tolist()
    texts = [chunk.text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    parts = encoder.parts(texts)
    counts = np.array([part.size for part in parts], dtype=np.uint64) + chunk.starts
    ids = np.empty(int(counts.sum()), dtype=np.uint16)
    position = 0
    for part, begins in zip(parts, chunk.starts.tolist(), strict=True):
        if begins:
            ids[position] = tokenizer.END_OF_TEXT
            position += 1
        if part.size and int(part.max()) >= tokenizer.END_OF_TEXT:
            raise ValueError(f"{part.max()} is no id of ordinary text in GPT-2's vocabulary")
        ids[position : position + part.size] = part
        position += part.size
    return Encoded(ids, counts)
