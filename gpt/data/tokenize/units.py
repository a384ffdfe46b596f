"""Units of work, and the journal in which finished ones stand.

A unit is a range of rows of one file: row groups, or rows of a large one. It is named by all that
decides its ids, so whoever needs the same unit again finds it: the same data set after it was
killed, or another one that has the file too. The journal is a file of lines beside the shards,
written in the order of the ids; a line counts only if the ids in the shards still have its digest.
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
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpt.data.shards import read_stream

UNIT_JOURNAL = "units.jsonl"
SPLITS = ("train", "validation")
UNIT_BYTES = 16_000_000
"""Text in one unit, bytes, as the file's footer tells it: what a killed run has to do again."""


@dataclass(frozen=True)
class Unit:
    """Rows `rows` of a file, counted over its row groups, which lie in row groups `groups`."""

    rows: range
    groups: range


def split_into_units(groups: Sequence[tuple[int, int]]) -> Iterator[Unit]:
    """Cut a file's row groups, given as (rows, bytes of text), into units of about `UNIT_BYTES`:
    several small row groups, or a part of a large one. Depends on the file alone."""
    first_group = first_row = row = size = 0
    for index, (rows, text_bytes) in enumerate(groups):
        if text_bytes >= 2 * UNIT_BYTES and rows > 1:
            if row > first_row:
                yield Unit(range(first_row, row), range(first_group, index))
            yield from _parts(row, rows, text_bytes, index)
            row += rows
            first_group, first_row, size = index + 1, row, 0
            continue
        row, size = row + rows, size + text_bytes
        if size >= UNIT_BYTES:
            yield Unit(range(first_row, row), range(first_group, index + 1))
            first_group, first_row, size = index + 1, row, 0
    if row > first_row:
        yield Unit(range(first_row, row), range(first_group, len(groups)))


def _parts(first_row: int, rows: int, text_bytes: int, group: int) -> Iterator[Unit]:
    count = min(rows, -(-text_bytes // UNIT_BYTES))
    bounds = [first_row + rows * i // count for i in range(count + 1)]
    for start, end in pairwise(bounds):
        yield Unit(range(start, end), range(group, group + 1))


# --- what was counted ----------------------------------------------------------------------------


@dataclass
class SplitCounts:
    """What went to training, or to validation. `digest` is of the ids, as they stand in shards."""

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
    sides: dict[str, SplitCounts] = field(
        default_factory=lambda: {name: SplitCounts() for name in SPLITS}
    )
    lengths: Counter[int] = field(default_factory=Counter)
    """Documents by the bits of their length in tokens."""

    @property
    def documents(self) -> int:
        return sum(side.documents for side in self.sides.values())

    @property
    def tokens(self) -> int:
        return sum(side.tokens for side in self.sides.values())

    def add(self, other: UnitCounts) -> None:
        self.rows += other.rows
        self.skipped.update(other.skipped)
        self.lengths.update(other.lengths)
        for name, side in self.sides.items():
            side.add(other.sides[name])


@dataclass(frozen=True)
class JournalEntry:
    """One line of a journal: a finished unit."""

    key: str
    engine: str
    tally: UnitCounts
    whole: bool = True
    """Whether nothing of it was cut off by data.max_tokens."""


class IdsDigest:
    """The digest of one side of a unit, made while its ids go by."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()  # processors have instructions for this one

    def update(self, ids: NDArray[np.uint16]) -> None:
        self._hash.update(np.ascontiguousarray(ids).data.cast("B"))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


# --- the journal ---------------------------------------------------------------------------------


class UnitJournal:
    """A journal, open for appending behind the lines that are kept."""

    def __init__(
        self, folder: Path, tokens_per_shard: int, kept: Iterable[JournalEntry] = ()
    ) -> None:
        path = folder / UNIT_JOURNAL
        fresh = path.with_name(f".{UNIT_JOURNAL}.{os.getpid()}")
        self._file: IO[str] = fresh.open("w", encoding="utf-8")
        self._line({"tokens_per_shard": tokens_per_shard})
        for entry in kept:
            self._line(_to_json(entry))
        self._file.flush()
        fresh.replace(path)

    def append(self, entry: JournalEntry) -> None:
        """The ids must have been handed to the operating system before."""
        self._line(_to_json(entry))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _line(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")


def _to_json(entry: JournalEntry) -> dict[str, Any]:
    tally = vars(entry.tally) | {"sides": {k: vars(v) for k, v in entry.tally.sides.items()}}
    return vars(entry) | {"tally": tally}


def _from_json(value: dict[str, Any]) -> JournalEntry:
    tally = value.pop("tally")
    return JournalEntry(
        **value,
        tally=UnitCounts(
            rows=tally["rows"],
            skipped=Counter(tally["skipped"]),
            sides={name: SplitCounts(**tally["sides"][name]) for name in SPLITS},
            lengths=Counter({int(bits): count for bits, count in tally["lengths"].items()}),
        ),
    )


@dataclass(frozen=True)
class StoredUnit:
    """A finished unit as it lies in some data set's shards."""

    entry: JournalEntry
    folder: Path
    tokens_per_shard: int
    first: Mapping[str, int]
    """Where its ids begin in the stream of each split."""

    def ids(self, split: str) -> Iterator[NDArray[np.uint16]]:
        count = self.entry.tally.sides[split].tokens
        return read_stream(self.folder, split, self.tokens_per_shard, self.first[split], count)

    def is_intact(self) -> bool:
        """Whether the shards hold what the journal says; reads all of it."""
        for split in SPLITS:
            digest = IdsDigest()
            for ids in self.ids(split):
                digest.update(ids)
            if digest.hexdigest() != self.entry.tally.sides[split].digest:
                return False
        return True


def read_unit_keys(datasets: Path) -> set[str]:
    """The keys of the units of every data set in a folder, whole or broken off."""
    folders = datasets.iterdir() if datasets.is_dir() else ()
    return {stored.entry.key for folder in folders for stored in read_stored_units(folder)}


def read_stored_units(folder: Path) -> list[StoredUnit]:
    """The units of the data set in `folder`, whole or broken off; none if there is no journal.
    What follows a line that is torn or makes no sense is as good as none."""
    found: list[StoredUnit] = []
    first = dict.fromkeys(SPLITS, 0)
    try:
        with (folder / UNIT_JOURNAL).open(encoding="utf-8") as lines:
            tokens_per_shard = int(json.loads(next(lines))["tokens_per_shard"])
            for line in lines:
                entry = _from_json(json.loads(line))
                found.append(StoredUnit(entry, folder, tokens_per_shard, dict(first)))
                for split in SPLITS:
                    first[split] += entry.tally.sides[split].tokens
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        pass
    return found
