"""Ids to shards, in order: the one writer of a dataset and of its journal.

Whatever the journal lists is in the shards; after a kill, what it does not list is written again.
"""

import hashlib
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from gpt.artifacts import Shard
from gpt.data.shards import ShardWriter
from gpt.data.tokenize.build import DatasetBuild
from gpt.data.tokenize.encoders import PART, EncodedChunk, Parts
from gpt.data.tokenize.units import SPLITS, JournalEntry, StoredUnit, UnitCounts, open_journal


class DatasetWriter(ExitStack):
    """Writes encoded chunks and copies stored units, in order. On exit it closes all files.

    It never exceeds `max_tokens`: `is_full` means that a document was left out because of it and
    that nothing more can be written.
    """

    def __init__(self, build: DatasetBuild) -> None:
        super().__init__()
        data, entries = build.plan.data, [stored.entry for _, stored in build.finished]
        self.total = UnitCounts()
        for entry in entries:
            self.total.add(entry.counts)
        self.is_full = False
        self._engine, self._max_tokens = build.engine, data.max_tokens
        journal = open_journal(build.folder, data.tokens_per_shard, entries)
        self._journal = self.enter_context(journal)
        self._shards = {
            name: self.enter_context(
                ShardWriter(build.folder, name, data.tokens_per_shard, counts.tokens)
            )
            for name, counts in self.total.splits.items()
        }
        self._begin_unit()

    def _begin_unit(self) -> None:
        self._unit = UnitCounts()
        self._digests = {split: hashlib.sha256() for split in SPLITS}
        self._open_document_tokens = 0
        self._held_back: tuple[NDArray[np.uint16], Parts] = np.empty(0, "<u2"), np.empty(0, PART)

    @property
    def rows(self) -> int:
        return self.total.rows + self._unit.rows

    @property
    def tokens(self) -> int:
        return self.total.tokens + self._unit.tokens

    def write(self, chunk: EncodedChunk) -> None:
        """Write a chunk; with `max_tokens`, as many of its documents as fit."""
        self._unit.rows += chunk.rows
        self._unit.skipped.update(chunk.skipped)
        if self._max_tokens is None:
            self._write_parts(chunk.ids, chunk.parts)
        else:
            self._write_parts(*self._take_fitting(chunk, self._max_tokens - self.tokens))

    def _take_fitting(self, chunk: EncodedChunk, room: int) -> tuple[NDArray[np.uint16], Parts]:
        """The complete documents that fit. The beginning of one that may still fit is held back."""
        ids = np.concatenate([self._held_back[0], chunk.ids])
        parts = np.concatenate([self._held_back[1], chunk.parts])
        sums = np.cumsum(parts["tokens"])
        fitting = np.flatnonzero(parts["ends"] & (sums <= room))
        count = int(fitting[-1]) + 1 if fitting.size else 0
        size = int(sums[count - 1]) if count else 0
        self._held_back = ids[size:], parts[count:]
        self.is_full = bool(ids.size > room)
        return ids[:size], parts[:count]

    def _write_parts(self, ids: NDArray[np.uint16], parts: Parts) -> None:
        for split in SPLITS:
            chosen = parts["held_out"] == (split == "validation")
            if not chosen.any():
                continue
            split_ids = ids if chosen.all() else ids[np.repeat(chosen, parts["tokens"])]
            counts = self._unit.splits[split]
            counts.documents += int(np.count_nonzero(chosen & parts["starts"]))
            counts.text_bytes += int(parts["text_bytes"][chosen].sum())
            self._write_ids(split, split_ids)
            counts.tokens += split_ids.size
        self._count_lengths(parts)

    def _write_ids(self, split: str, ids: NDArray[np.uint16]) -> None:
        self._digests[split].update(ids.data)
        self._shards[split].write(ids)

    def _count_lengths(self, parts: Parts) -> None:
        sums = np.cumsum(parts["tokens"]) + self._open_document_tokens
        ends = sums[parts["ends"]]
        for tokens in np.diff(ends, prepend=0).tolist():
            self._unit.lengths[(tokens - 1).bit_length()] += 1
        if sums.size:
            self._open_document_tokens = int(sums[-1] - (ends[-1] if ends.size else 0))

    def end_unit(self, key: str, engine: str = "") -> UnitCounts:
        """Flush the unit's ids, then add it to the journal. Returns what it contained."""
        for split in SPLITS:
            self._shards[split].flush()
            self._unit.splits[split].digest = self._digests[split].hexdigest()
        counts = self._unit
        entry = JournalEntry(key, engine or self._engine, counts, complete=not self.is_full)
        self._journal.write(entry.to_line())
        self._journal.flush()
        self.total.add(counts)
        self._begin_unit()
        return counts

    def copy_unit(self, stored: StoredUnit) -> UnitCounts:
        """Copy a unit from another dataset. It must be intact. Returns what it contained."""
        for split in SPLITS:
            for ids in stored.ids(split):
                self._write_ids(split, ids)
        self._unit.add(stored.entry.counts)
        return self.end_unit(stored.entry.key, stored.entry.engine)

    def finish(self) -> dict[str, tuple[Shard, ...]]:
        """Finish the last shards. Returns all of them by split."""
        return {split: writer.close() for split, writer in self._shards.items()}
