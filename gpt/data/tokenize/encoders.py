"""A chunk of text to token ids: what one worker does, in whichever process it runs.

Chunks are plain buffers, so they cross a pipe as they are. This module imports nothing heavier than
numpy and tiktoken; gigatoken is imported only when it is the engine.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gpt.data.tokenize import tokenizer
from gpt.errors import CorpusError, Problem

EngineName = Literal["tiktoken", "gigatoken"]
GIGATOKEN_PACKAGE = "gigatoken"

PART = np.dtype(
    [("text_bytes", "<i8"), ("tokens", "<i8"), ("starts", "?"), ("ends", "?"), ("held_out", "?")]
)
"""One part of a document: usually all of it, but a long document is split. `starts` and `ends`:
whether the part begins or ends its document. `held_out`: whether the document is for validation.
`tokens`: 0 until the part is encoded; includes the end-of-text token before its document."""
Parts = NDArray[np.void]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Text of one unit: some parts, end to end."""

    text: bytes
    parts: Parts
    rows: int = 0
    """Rows read since the previous chunk of the unit."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Those of them without a document, by reason."""
    ends_unit: bool = False

    def with_ids(self, ids: NDArray[np.uint16], parts: Parts) -> EncodedChunk:
        return EncodedChunk(ids, parts, self.rows, self.skipped, self.ends_unit)


@dataclass(frozen=True, eq=False)
class EncodedChunk:
    """A chunk with its ids in place of its text, an end-of-text token before each document."""

    ids: NDArray[np.uint16]
    parts: Parts
    rows: int
    skipped: Counter[str]
    ends_unit: bool


Encoder = Callable[[list[bytes]], tokenizer.TokenIds]
"""Encodes texts, each of them complete UTF-8. Raises `EncoderMismatchError`."""

_thread_local = threading.local()


def resolve_engine(engine: str) -> EngineName:
    """Choose the encoder for `data.engine`. Raises `CorpusError` for gigatoken where it is not
    installed."""
    installed = importlib.util.find_spec(GIGATOKEN_PACKAGE) is not None
    if engine == "gigatoken" and not installed:
        remedy = (
            "pip install 'overnight[turbo]' (on a cluster: on every worker), or set data.engine "
        )
        remedy += "to auto or tiktoken"
        raise CorpusError(Problem("data.engine", engine, "gigatoken is not installed", remedy))
    return "gigatoken" if engine != "tiktoken" and installed else "tiktoken"


def load_encoder(engine: EngineName) -> Encoder:
    """Load the ranks and the engine, once per thread; takes 0.2 to 0.5 s."""
    if getattr(_thread_local, "engine", None) != engine:
        tokenizer.load_tokenizer()
        encoder = tokenizer.encode_texts
        if engine == "gigatoken":
            from gpt.data.tokenize.gigatoken_encoder import GigatokenEncoder

            encoder = GigatokenEncoder().encode
        _thread_local.encoder, _thread_local.engine = encoder, engine
    loaded: Encoder = _thread_local.encoder
    return loaded


def encode_chunk(engine: EngineName, chunk: Chunk) -> EncodedChunk:
    """Encode a chunk; the result depends on its text alone.

    Raises `EncoderMismatchError`, and `ValueError` for an id outside GPT-2's ordinary vocabulary
    (uint16 would hide it).
    """
    parts = chunk.parts.copy()
    if not parts.size:
        return chunk.with_ids(np.empty(0, np.uint16), parts)
    ends = np.cumsum(parts["text_bytes"]).tolist()
    texts = [chunk.text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    ids, counts = load_encoder(engine)(texts)
    if ids.size and int(ids.max()) >= tokenizer.END_OF_TEXT:
        raise ValueError(f"{ids.max()} is not the id of ordinary text in GPT-2's vocabulary")
    document_starts = (np.cumsum(counts) - counts)[parts["starts"]]
    separated = np.insert(ids.astype(np.uint16), document_starts, tokenizer.END_OF_TEXT)
    parts["tokens"] = counts + parts["starts"]
    return chunk.with_ids(separated, parts)
