"""Which rows become documents: polars decides data.where, the rest is counting.

polars is imported only for a condition: it takes half a second.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gpt.data.sources import CorpusFile
from gpt.errors import CorpusError, Problem

if TYPE_CHECKING:
    import polars as pl

HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_ROW = "overnight row"
_NOT_BY_ROW = {"Agg", "Len", "Over", "Range", "Rank", "Rolling", "Shift", "SubPlan", "Window"}
"""polars' names for what looks at more than one row; its own is_row_separable lets AVG pass."""
_EXAMPLE = "as data.where = \"language_score > 0.9 AND language = 'en'\""


@dataclass(frozen=True)
class RowFilter:
    """The text column and the conditions on a row."""

    column: str
    where: str = ""
    min_length: int = 0
    max_length: int | None = None
    numbered: frozenset[str] = frozenset()
    """Hive's partition keys whose values are all whole numbers."""

    @cached_property
    def _condition(self) -> pl.Expr:
        """Raises `CorpusError` for what is no condition on a row."""
        import polars as pl

        try:
            condition = pl.sql_expr(self.where)
        except pl.exceptions.PolarsError as error:
            raise CorpusError(self._refused(f"polars cannot read it: {error}")) from error
        if _words_of(condition) & _NOT_BY_ROW:
            rule = "must be decided for each row by itself, without totals, windows or subqueries"
            raise CorpusError(self._refused(rule))
        return condition

    @cached_property
    def asked(self) -> tuple[str, ...]:
        """The columns that the condition names."""
        return tuple(dict.fromkeys(self._condition.meta.root_names())) if self.where else ()

    def _refused(self, rule: str) -> Problem:
        return Problem("data.where", self.where, rule, _EXAMPLE)

    def check_condition(self) -> None:
        """Raises `CorpusError` for a data.where that is no condition on a row."""
        if self.where:
            assert self._condition is not None

    def columns_in(self, schema: pa.Schema) -> list[str]:
        """The columns of the file that the condition asks for."""
        return [name for name in self.asked if name in schema.names]

    def check(self, file: CorpusFile, schema: pa.Schema) -> None:
        """Raises `CorpusError` where the condition cannot be asked of this file."""
        missing = [
            name for name in self.asked if name not in schema.names and name not in file.partitions
        ]
        if missing:
            there = ", ".join([*schema.names, *file.partitions])
            rule = f"has no column {', '.join(missing)}, which data.where asks for; it has {there}"
            remedy = "mend data.where, or leave the file out of data.source"
            raise CorpusError(Problem(file.name, "", rule, remedy))
        if self.where:
            self._holds(file, schema.empty_table().select(self.columns_in(schema)))

    def select(
        self,
        file: CorpusFile,
        batch: pa.RecordBatch,
        texts: Sequence[memoryview],
        nulls: NDArray[np.bool_],
    ) -> tuple[NDArray[np.bool_], Counter[str]]:
        """Which rows are kept, and how many are not by which reason."""
        skipped: Counter[str] = Counter()
        kept = np.ones(len(texts), dtype=bool)

        def leave_out(reason: str, rows: NDArray[np.bool_]) -> None:
            skipped[reason] += int(np.count_nonzero(kept & rows))
            kept[rows] = False

        leave_out("null", nulls)
        leave_out("empty", np.array([not text for text in texts], dtype=bool))
        if self.where:
            table = pa.table(batch).select(self.columns_in(batch.schema))
            leave_out("where", ~self._holds(file, table, len(texts)))
        if self.min_length > 1 or self.max_length is not None:
            lengths = np.array([len(str(text, "utf-8")) for text in texts])
            leave_out("short", lengths < self.min_length)
            if self.max_length is not None:
                leave_out("long", lengths > self.max_length)
        return kept, skipped

    def _holds(self, file: CorpusFile, table: pa.Table, rows: int = 0) -> NDArray[np.bool_]:
        """Row by row; unknown (a null was asked) is no."""
        import polars as pl

        try:
            frame = pl.DataFrame({_ROW: pl.int_range(rows, eager=True)})
            if table.num_columns:
                frame = frame.hstack(pl.DataFrame(pl.from_arrow(table)))
            values = [
                self._partition(name, file) for name in self.asked if name not in frame.columns
            ]
            kept = frame.with_columns(values).with_columns(self._condition.alias(_ROW))[_ROW]
        except pl.exceptions.PolarsError as error:
            rule = f"polars cannot ask this of {file.name}: {error}"
            raise CorpusError(self._refused(rule)) from error
        if kept.dtype != pl.Boolean:
            raise CorpusError(self._refused(f"must be true or false, not {kept.dtype}"))
        return kept.fill_null(False).to_numpy().astype(bool)

    def _partition(self, name: str, file: CorpusFile) -> pl.Expr:
        import polars as pl

        value = _partition_value(file.partitions[name])
        if name in self.numbered:
            return pl.lit(None if value is None else int(value), dtype=pl.Int64).alias(name)
        return pl.lit(value, dtype=pl.String).alias(name)


def _words_of(condition: pl.Expr) -> set[str]:
    """The names of all that polars made of a condition, but for its literals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the text form may change; a test holds it
        tree = json.loads(condition.meta.serialize(format="json"))

    def words(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield key
                if key not in ("Literal", "Column"):
                    yield from words(value)
        elif isinstance(node, list):
            for value in node:
                yield from words(value)
        elif isinstance(node, str):
            yield node

    return set(words(tree))


def _partition_value(text: str) -> str | None:
    return None if text == HIVE_NULL else unquote(text)


def find_integer_partitions(files: Iterable[CorpusFile]) -> frozenset[str]:
    """The partition keys that hold whole numbers in all of the files."""
    values: dict[str, bool] = {}
    for file in files:
        for key, text in file.partitions.items():
            value = _partition_value(text)
            number = value is None or re.fullmatch(r"-?\d{1,18}", value) is not None
            values[key] = values.get(key, True) and number
    return frozenset(key for key, number in values.items() if number)


def collect_partition_values(file: CorpusFile, selection: RowFilter) -> Mapping[str, Any]:
    """What of a file's path decides which rows are kept."""
    return {
        name: [file.partitions[name], name in selection.numbered]
        for name in selection.asked
        if name in file.partitions
    }


HASH_BYTES = 16


def hash_text(text: memoryview) -> bytes:
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


class SeenTexts:
    """Which texts have come by already, by 128 bits of a hash, in a file of its own: memory does
    not grow with the corpus. It lives as long as one tokenising; nothing has to survive."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.unlink(missing_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-32000"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def is_new(self, text: memoryview) -> bool:
        """Whether `text` was never asked about before."""
        return self.is_new_hash(hash_text(text))

    def is_new_hash(self, digest: bytes) -> bool:
        """The same of a text whose `hash_text` this is."""
        done = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,))
        return done.rowcount == 1

    def close(self) -> None:
        self._database.close()
        self._path.unlink(missing_ok=True)
