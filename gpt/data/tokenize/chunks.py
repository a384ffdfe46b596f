"""Rows to chunks of text, in order: read in one process, encoded in others."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpt.data.filters import RowFilter, hash_text
from gpt.data.parquet import ParquetSource, read_rows
from gpt.data.tokenize.encoders import PART, Chunk
from gpt.data.tokenize.safe_split import split_safely
from gpt.data.tokenize.units import Unit

CHUNK_BYTES = 1_000_000
"""Text sent to a worker at once. A longer document is split where that does not change its ids."""


def is_validation(text: bytes | memoryview, fraction: float) -> bool:
    """Whether a document (UTF-8) belongs to the validation split: decided by its own text alone.

    A checksum spreads texts evenly enough, in a fifth of the time of a cryptographic hash.
    """
    return zlib.crc32(text) < fraction * 2**32


def read_chunks(
    source: ParquetSource,
    units: Sequence[Unit],
    row_filter: RowFilter,
    validation_fraction: float,
    is_new: Callable[[bytes], bool] | None = None,
) -> Iterator[tuple[int, Chunk]]:
    """Read some units of a file in one pass: yields the index of a unit and a chunk of it. The last
    chunk of each unit has `ends_unit` set, and is without text if nothing was left to send.

    `is_new` is asked about the hash of every document in order; one that is not new is skipped as
    "duplicate". Raises `CorpusError` as `read_rows` does.
    """
    builder = _ChunkBuilder()
    unit = 0
    for batch in read_rows(source, units, row_filter):
        if batch.unit != unit:
            yield unit, builder.flush(ends_unit=True)
            unit = batch.unit
        for text in batch.texts:
            if is_new and not is_new(hash_text(text)):
                builder.skipped["duplicate"] += 1
                continue
            for chunk in builder.add(text, is_validation(text, validation_fraction)):
                yield unit, chunk
        builder.rows += batch.count
        builder.skipped.update(batch.skipped)
    yield unit, builder.flush(ends_unit=True)


class _ChunkBuilder:
    """Collects parts until they fill a chunk."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.rows = 0
        self.skipped: Counter[str] = Counter()
        self._texts: list[memoryview] = []
        self._parts: list[tuple[int, int, bool, bool, bool]] = []
        self._bytes = 0

    def add(self, text: memoryview, held_out: bool) -> Iterator[Chunk]:
        remaining = len(text)
        for part in split_safely(text, CHUNK_BYTES):
            if self._texts and self._bytes + len(part) > CHUNK_BYTES:
                yield self.flush()
            starts = remaining == len(text)
            remaining -= len(part)
            self._texts.append(part)
            self._parts.append((len(part), 0, starts, remaining == 0, held_out))
            self._bytes += len(part)

    def flush(self, ends_unit: bool = False) -> Chunk:
        parts = np.array(self._parts, dtype=PART)
        chunk = Chunk(b"".join(self._texts), parts, self.rows, self.skipped, ends_unit)
        self._clear()
        return chunk
