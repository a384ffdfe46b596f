"""Rows to chunks of text, in order: what is read in one process and encoded in others."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpt.data.filters import RowFilter
from gpt.data.parquet import ParquetSource, read_rows
from gpt.data.tokenize.encoders import Chunk
from gpt.data.tokenize.safe_split import split_safely
from gpt.data.tokenize.units import Unit

CHUNK_BYTES = 1_000_000
"""Text that crosses to a worker at once; a longer document is cut where that is safe."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A chunk, and what there is to know of its documents without their ids."""

    chunk: Chunk
    held_out: NDArray[np.bool_]
    """Which parts belong to documents for validation."""
    ends: NDArray[np.bool_]
    """Which parts end their document."""
    rows: int
    """Rows read since the chunk before."""
    skipped: Counter[str]


@dataclass(frozen=True)
class UnitEnd:
    """All chunks of a unit came by; what was read since the last of them."""

    rows: int
    skipped: Counter[str]


class Seen(Protocol):
    """Asked about the text of every document, in order."""

    def is_new(self, text: memoryview) -> bool: ...


def is_validation(text: bytes | memoryview, fraction: float) -> bool:
    """Whether a document, as UTF-8, is kept out of training: by its own text and nothing else.

    A checksum spreads texts evenly enough, in a fifth of the time that a cryptographic hash takes.
    """
    return zlib.crc32(text) < fraction * 2**32


def chunks(
    source: ParquetSource,
    units: Sequence[Unit],
    selection: RowFilter,
    validation_fraction: float,
    seen: Seen | None,
) -> Iterator[Batch | UnitEnd]:
    """The chunks of some units of a file, in one pass, each unit closed by its `UnitEnd`.

    Texts that `seen` knows are left out as "duplicate". Raises `CorpusError` as `read_rows` does.
    """
    builder = _Builder()
    unit = 0
    for rows in read_rows(source, units, selection):
        if rows.unit != unit:
            yield from builder.end()
            unit = rows.unit
        for text in rows.texts:
            if seen and not seen.is_new(text):
                builder.skipped["duplicate"] += 1
                continue
            yield from builder.add(text, is_validation(text, validation_fraction))
        builder.rows += rows.count
        builder.skipped.update(rows.skipped)
    yield from builder.end()


class _Builder:
    """Gathers parts until they make a chunk."""

    def __init__(self) -> None:
        self.rows = 0
        self.skipped: Counter[str] = Counter()
        self._clear()

    def _clear(self) -> None:
        self._parts: list[memoryview] = []
        self._flags: list[tuple[bool, bool, bool]] = []
        self._bytes = 0

    def add(self, text: memoryview, held_out: bool) -> Iterator[Batch]:
        parts = [text] if len(text) <= CHUNK_BYTES else split_safely(text, CHUNK_BYTES)
        remaining = len(text)
        for part in parts:
            if self._parts and self._bytes + len(part) > CHUNK_BYTES:
                yield self._flush()
            starts = remaining == len(text)
            remaining -= len(part)
            self._parts.append(part)
            self._flags.append((starts, remaining == 0, held_out))
            self._bytes += len(part)

    def end(self) -> Iterator[Batch | UnitEnd]:
        if self._parts:
            yield self._flush()
        yield UnitEnd(self.rows, self.skipped)
        self.rows, self.skipped = 0, Counter()

    def _flush(self) -> Batch:
        starts, ends, held_out = np.array(self._flags, dtype=bool).T
        lengths = np.array([len(part) for part in self._parts], dtype=np.uint64)
        chunk = Chunk(b"".join(self._parts), lengths, starts)
        batch = Batch(chunk, held_out, ends, self.rows, self.skipped)
        self.rows, self.skipped = 0, Counter()
        self._clear()
        return batch
