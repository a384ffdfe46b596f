"""Ids to shards, in order: the one writer of a data set, and its journal.

Whatever stands in the journal is in the shards; killed between the two, the rest is written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt.artifacts import Shard
from gpt.data.shards import ShardWriter
from gpt.data.tokenize.chunks import Batch, UnitEnd
from gpt.data.tokenize.encoders import Encoded, EngineName
from gpt.data.tokenize.units import (
    SPLITS,
    IdsDigest,
    JournalEntry,
    StoredUnit,
    UnitCounts,
    UnitJournal,
)


@dataclass(frozen=True, eq=False)
class Parts:
    """Parts of documents with their ids, end to end."""

    ids: NDArray[np.uint16]
    counts: NDArray[np.int64]
    """Ids of each part."""
    text_bytes: NDArray[np.int64]
    starts: NDArray[np.bool_]
    ends: NDArray[np.bool_]
    held_out: NDArray[np.bool_]

    def split(self, index: int) -> tuple[Parts, Parts]:
        place = int(self.counts[:index].sum())
        others: list[Any] = [getattr(self, field.name) for field in fields(self)[1:]]
        first = Parts(self.ids[:place], *(array[:index] for array in others))
        return first, Parts(self.ids[place:], *(array[index:] for array in others))

    def joined(self, other: Parts) -> Parts:
        names = [field.name for field in fields(self)]
        return Parts(*(np.concatenate([getattr(self, n), getattr(other, n)]) for n in names))


class Assembly:
    """Takes batches with their ids, and units that are there already, in order.

    `max_tokens` is never passed: `full` says that a document was left out for it, and that there
    is nothing more to take.
    """

    def __init__(
        self,
        folder: Path,
        tokens_per_shard: int,
        engine: EngineName,
        max_tokens: int | None,
        kept: Sequence[JournalEntry],
    ) -> None:
        self.total = UnitCounts()
        for entry in kept:
            self.total.add(entry.tally)
        self.full = any(not entry.whole for entry in kept)
        self._engine, self._max_tokens = engine, max_tokens
        self._stack = ExitStack()
        self._journal = UnitJournal(folder, tokens_per_shard, kept)
        self._stack.callback(self._journal.close)
        self._writers = {
            name: self._stack.enter_context(
                ShardWriter(folder, name, tokens_per_shard, self.total.sides[name].tokens)
            )
            for name in SPLITS
        }
        self._begin()

    def __enter__(self) -> Assembly:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _begin(self) -> None:
        self._unit = UnitCounts()
        self._digests = {name: IdsDigest() for name in SPLITS}
        self._open_tokens = 0
        self._held: Parts | None = None

    @property
    def rows(self) -> int:
        return self.total.rows + self._unit.rows

    @property
    def tokens(self) -> int:
        return self.total.tokens + self._unit.tokens

    def take(self, batch: Batch, encoded: Encoded) -> None:
        """Write a batch; with `max_tokens`, the documents for which there is room."""
        self._unit.rows += batch.rows
        self._unit.skipped.update(batch.skipped)
        parts = Parts(
            encoded.ids,
            encoded.counts.astype(np.int64),
            batch.chunk.lengths.astype(np.int64),
            batch.chunk.starts,
            batch.ends,
            batch.held_out,
        )
        self._write(parts if self._max_tokens is None else self._fitting(parts, self._max_tokens))

    def _fitting(self, parts: Parts, max_tokens: int) -> Parts:
        """The documents that fit, whole; the beginning of one that may is held back."""
        if self._held:
            parts = self._held.joined(parts)
        sums = np.cumsum(parts.counts)
        fits = np.flatnonzero(parts.ends & (sums <= max_tokens - self.tokens))
        fitting, self._held = parts.split(int(fits[-1]) + 1 if fits.size else 0)
        self.full = bool(sums[-1] > max_tokens - self.tokens)
        return fitting

    def _write(self, parts: Parts) -> None:
        for name, mine in (("train", ~parts.held_out), ("validation", parts.held_out)):
            if not mine.any():
                continue
            ids = parts.ids if mine.all() else parts.ids[np.repeat(mine, parts.counts)]
            side = self._unit.sides[name]
            side.documents += int(np.count_nonzero(mine & parts.starts))
            side.tokens += ids.size
            side.text_bytes += int(parts.text_bytes[mine].sum())
            self._digests[name].update(ids)
            self._writers[name].write(ids)
        self._count_lengths(parts)

    def _count_lengths(self, parts: Parts) -> None:
        sums = np.cumsum(parts.counts) + self._open_tokens
        ends = sums[parts.ends]
        for tokens in np.diff(ends, prepend=0).tolist():
            self._unit.lengths[(tokens - 1).bit_length()] += 1
        if sums.size:
            self._open_tokens = int(sums[-1] - (ends[-1] if ends.size else 0))

    def end_unit(self, key: str, end: UnitEnd) -> UnitCounts:
        """Close a unit: its ids first, then its line in the journal. What it came to."""
        self._unit.rows += end.rows
        self._unit.skipped.update(end.skipped)
        return self._journalled(key, self._engine, not self.full)

    def copy(self, stored: StoredUnit) -> UnitCounts:
        """Take a unit over as it lies in another data set. It must be intact."""
        for name in SPLITS:
            for ids in stored.ids(name):
                self._digests[name].update(ids)
                self._writers[name].write(ids)
        self._unit.add(stored.entry.tally)
        return self._journalled(stored.entry.key, stored.entry.engine, True)

    def _journalled(self, key: str, engine: str, whole: bool) -> UnitCounts:
        for name in SPLITS:
            self._writers[name].flush()
            self._unit.sides[name].digest = self._digests[name].hexdigest()
        tally = self._unit
        self._journal.append(JournalEntry(key, engine, tally, whole))
        self.total.add(tally)
        self._begin()
        return tally

    def close(self) -> dict[str, tuple[Shard, ...]]:
        """Finish the last shards; all of them, by split."""
        return {name: writer.close() for name, writer in self._writers.items()}
