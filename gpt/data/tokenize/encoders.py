"""A chunk of text to ids: what one worker does, whichever process it runs in.

Chunks are plain buffers, so that they cross a pipe as they are. Nothing here imports more than
numpy and the encoder that is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gpt.data.tokenize import tokenizer

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


class EncoderMismatchError(Exception):
    """The faster encoder gave other ids than tiktoken; says where."""


Ids = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""The ids of some texts, end to end, and how many each text has."""


class Encoder(Protocol):
    def encode(self, texts: list[bytes]) -> Ids:
        """The ids of texts, each of which is whole UTF-8. Raises `EncoderMismatchError`."""


class TiktokenEncoder:
    def encode(self, texts: list[bytes]) -> Ids:
        return joined([tokenizer.encode(text.decode()) for text in texts])


def joined(parts: list[NDArray[Any]]) -> Ids:
    return np.concatenate(parts), np.array([part.size for part in parts], dtype=np.int64)


def encode_chunk(encoder: Encoder, chunk: Chunk) -> Encoded:
    """Depends on the chunk's text alone. Raises `EncoderMismatchError`, and `ValueError` for an id
    that is no token of GPT-2's (uint16 would hide it)."""
    ends = np.cumsum(chunk.lengths, dtype=np.int64).tolist()
    texts = [chunk.text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    ids, counts = encoder.encode(texts)
    if ids.size and int(ids.max()) >= tokenizer.END_OF_TEXT:
        raise ValueError(f"{ids.max()} is no id of ordinary text in GPT-2's vocabulary")
    places = (np.cumsum(counts) - counts)[chunk.starts]
    separated = np.insert(ids.astype(np.uint16), places, tokenizer.END_OF_TEXT)
    return Encoded(separated, (counts + chunk.starts).astype(np.uint64))
