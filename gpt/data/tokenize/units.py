"""Units of work, and the journal that lists the finished ones.

A unit is a range of rows of one file: some row groups, or a part of a large one. Its key is a hash
of everything that decides its token ids, so the same unit is found again later: by the same dataset
after it was killed, or by another dataset that contains the same file. The journal is a file of
JSON lines beside the shards, in the order of the ids; a line counts only if the ids in the shards
still have the digest that it gives.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from gpt.data.shards import read_stream

UNIT_JOURNAL = "units.jsonl"
SPLITS = ("train", "validation")
UNIT_BYTES = 16_000_000
"""Text per unit, in bytes as the file's footer states them: what a killed run has to repeat."""


@dataclass(frozen=True)
class Unit:
    """The rows of a file (counted over all its row groups), and the row groups they lie in."""

    rows: range
    groups: range


def split_into_units(groups: Sequence[tuple[int, int]]) -> Iterator[Unit]:
    """Split a file, given as (rows, bytes of text) per row group, into units of about `UNIT_BYTES`:
    several small row groups, or a part of a large one. Depends on the file alone."""
    first_group = first_row = row = size = 0
    for index, (rows, text_bytes) in enumerate(groups):
        if text_bytes >= 2 * UNIT_BYTES and rows > 1:
            if row > first_row:
                yield Unit(range(first_row, row), range(first_group, index))
            count = min(rows, -(-text_bytes // UNIT_BYTES))
            for start, end in pairwise(row + rows * i // count for i in range(count + 1)):
                yield Unit(range(start, end), range(index, index + 1))
            row += rows
            first_group, first_row, size = index + 1, row, 0
            continue
        row, size = row + rows, size + text_bytes
        if size >= UNIT_BYTES:
            yield Unit(range(first_row, row), range(first_group, index + 1))
            first_group, first_row, size = index + 1, row, 0
    if row > first_row:
        yield Unit(range(first_row, row), range(first_group, len(groups)))


@dataclass
class SplitCounts:
    """What went to one split. `digest` is the SHA-256 of the ids as they stand in the shards."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    digest: str = ""

    def add(self, other: SplitCounts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes


@dataclass
class UnitCounts:
    """What was counted over some rows."""

    rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Rows without a document, by reason."""
    splits: Annotated[dict[str, SplitCounts], Field(alias="sides")] = field(
        default_factory=lambda: {name: SplitCounts() for name in SPLITS}
    )
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents by the number of bits of their length in tokens."""

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    def add(self, other: UnitCounts) -> None:
        self.rows += other.rows
        self.skipped.update(other.skipped)
        self.lengths.update(other.lengths)
        for name, split in self.splits.items():
            split.add(other.splits[name])


@dataclass(frozen=True)
class JournalEntry:
    """A finished unit: one line of the journal. The aliases are the names in the file."""

    key: str
    engine: str
    counts: Annotated[UnitCounts, Field(alias="tally")]
    complete: Annotated[bool, Field(alias="whole")] = True
    """False where data.max_tokens cut documents off."""

    def to_line(self) -> bytes:
        return _ENTRY_JSON.dump_json(self, by_alias=True) + b"\n"


_ENTRY_JSON = TypeAdapter(JournalEntry)


def open_journal(folder: Path, tokens_per_shard: int, entries: Iterable[JournalEntry]) -> IO[bytes]:
    """Replace the journal by one with these entries; returns it open for appending."""
    path = folder / UNIT_JOURNAL
    new_path = path.with_name(f".{UNIT_JOURNAL}.{os.getpid()}")
    journal = new_path.open("wb")
    journal.write(b'{"tokens_per_shard":%d}\n' % tokens_per_shard)
    journal.writelines(entry.to_line() for entry in entries)
    journal.flush()
    new_path.replace(path)
    return journal


@dataclass(frozen=True)
class StoredUnit:
    """A finished unit as it lies in the shards of some dataset."""

    entry: JournalEntry
    folder: Path
    tokens_per_shard: int
    offsets: Mapping[str, int]
    """The position of its first id in the stream of each split."""

    def ids(self, split: str) -> Iterator[NDArray[np.uint16]]:
        count = self.entry.counts.splits[split].tokens
        return read_stream(self.folder, split, self.tokens_per_shard, self.offsets[split], count)

    def is_intact(self) -> bool:
        """Whether the shards hold what the journal says. Reads all of the unit's ids."""
        for split in SPLITS:
            digest = hashlib.sha256()
            for ids in self.ids(split):
                digest.update(ids.data)
            if digest.hexdigest() != self.entry.counts.splits[split].digest:
                return False
        return True


def read_stored_units(folder: Path) -> list[StoredUnit]:
    """List the finished units of the dataset in `folder`, complete or interrupted; none without a
    journal. Reading stops at the first line that is cut short or invalid."""
    found: list[StoredUnit] = []
    offsets = dict.fromkeys(SPLITS, 0)
    try:
        with (folder / UNIT_JOURNAL).open("rb") as lines:
            tokens_per_shard = int(json.loads(next(lines))["tokens_per_shard"])
            for line in lines:
                entry = _ENTRY_JSON.validate_json(line)
                found.append(StoredUnit(entry, folder, tokens_per_shard, dict(offsets)))
                for split in SPLITS:
                    offsets[split] += entry.counts.splits[split].tokens
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        pass
    return found


def read_unit_keys(datasets: Path) -> set[str]:
    """The keys of the finished units of every dataset below `datasets`, complete or interrupted."""
    folders = datasets.iterdir() if datasets.is_dir() else ()
    return {stored.entry.key for folder in folders for stored in read_stored_units(folder)}
