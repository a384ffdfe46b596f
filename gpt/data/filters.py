"""Filter rows: `data.where`, length limits and duplicates.

polars evaluates `data.where` and is imported only if there is one, which takes half a second.
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
_MULTI_ROW = {"Agg", "Len", "Over", "Range", "Rank", "Rolling", "Shift", "SubPlan", "Window"}
"""polars' names of expressions over more than one row. Its own is_row_separable accepts AVG."""
_EXAMPLE = "write e.g. data.where = \"language_score > 0.9 AND language = 'en'\""


@dataclass(frozen=True)
class RowFilter:
    """The text column and the conditions that a row must meet."""

    column: str
    where: str = ""
    min_length: int = 0
    max_length: int | None = None
    integer_partitions: frozenset[str] = frozenset()
    """Partition keys whose values are all integers."""

    @cached_property
    def _condition(self) -> pl.Expr:
        """The parsed `data.where`. Raises `CorpusError` if it is not a condition on one row."""
        import polars as pl

        try:
            condition = pl.sql_expr(self.where)
        except pl.exceptions.PolarsError as error:
            raise CorpusError(self._invalid(f"polars cannot read it: {error}")) from error
        if _expression_names(condition) & _MULTI_ROW:
            rule = "must use one row at a time, without aggregates, window functions or subqueries"
            raise CorpusError(self._invalid(rule))
        return condition

    @cached_property
    def where_columns(self) -> tuple[str, ...]:
        """The columns that `data.where` uses. Raises `CorpusError` as `_condition` does."""
        return tuple(dict.fromkeys(self._condition.meta.root_names())) if self.where else ()

    def _invalid(self, rule: str) -> Problem:
        return Problem("data.where", self.where, rule, _EXAMPLE)

    def columns_in(self, schema: pa.Schema) -> list[str]:
        """Return the columns of the file that `data.where` uses."""
        return [name for name in self.where_columns if name in schema.names]

    def check(self, file: CorpusFile, schema: pa.Schema) -> None:
        """Raise `CorpusError` if `data.where` cannot be evaluated on this file."""
        missing = [
            name
            for name in self.where_columns
            if name not in schema.names and name not in file.partitions
        ]
        if missing:
            found = ", ".join([*schema.names, *file.partitions])
            rule = f"has no column {', '.join(missing)}, which data.where uses; it has {found}"
            remedy = "fix data.where, or remove the file from data.source"
            raise CorpusError(Problem(file.name, "", rule, remedy))
        if self.where:
            self._evaluate_where(file, schema.empty_table().select(self.columns_in(schema)))

    def apply(
        self,
        file: CorpusFile,
        batch: pa.RecordBatch,
        texts: Sequence[memoryview],
        nulls: NDArray[np.bool_],
    ) -> tuple[NDArray[np.bool_], Counter[str]]:
        """Return which rows pass, and how many were skipped by reason."""
        skipped: Counter[str] = Counter()
        passed = np.ones(len(texts), dtype=bool)

        def skip(reason: str, rows: NDArray[np.bool_]) -> None:
            skipped[reason] += int(np.count_nonzero(passed & rows))
            passed[rows] = False

        skip("null", nulls)
        skip("empty", np.array([not text for text in texts], dtype=bool))
        if self.where:
            table = pa.table(batch).select(self.columns_in(batch.schema))
            skip("where", ~self._evaluate_where(file, table, len(texts)))
        if self.min_length > 1 or self.max_length is not None:
            lengths = np.array([len(str(text, "utf-8")) for text in texts])
            skip("short", lengths < self.min_length)
            if self.max_length is not None:
                skip("long", lengths > self.max_length)
        return passed, skipped

    def _evaluate_where(
        self, file: CorpusFile, table: pa.Table, rows: int = 0
    ) -> NDArray[np.bool_]:
        """Evaluate `data.where` per row; null counts as false."""
        import polars as pl

        try:
            frame = pl.DataFrame({_ROW: pl.int_range(rows, eager=True)})
            if table.num_columns:
                frame = frame.hstack(pl.DataFrame(pl.from_arrow(table)))
            values = [
                self._partition_literal(name, file)
                for name in self.where_columns
                if name not in frame.columns
            ]
            passed = frame.with_columns(values).with_columns(self._condition.alias(_ROW))[_ROW]
        except pl.exceptions.PolarsError as error:
            rule = f"polars cannot evaluate it on {file.name}: {error}"
            raise CorpusError(self._invalid(rule)) from error
        if passed.dtype != pl.Boolean:
            raise CorpusError(self._invalid(f"must be true or false, not {passed.dtype}"))
        return passed.fill_null(False).to_numpy().astype(bool)

    def _partition_literal(self, name: str, file: CorpusFile) -> pl.Expr:
        import polars as pl

        value = _partition_value(file.partitions[name])
        if name in self.integer_partitions:
            return pl.lit(None if value is None else int(value), dtype=pl.Int64).alias(name)
        return pl.lit(value, dtype=pl.String).alias(name)


def _expression_names(condition: pl.Expr) -> set[str]:
    """Return the names of polars expressions in a condition, without its literals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the JSON form may change; tests would notice
        tree = json.loads(condition.meta.serialize(format="json"))

    def names(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield key
                if key not in ("Literal", "Column"):
                    yield from names(value)
        elif isinstance(node, list):
            for value in node:
                yield from names(value)
        elif isinstance(node, str):
            yield node

    return set(names(tree))


def _partition_value(text: str) -> str | None:
    return None if text == HIVE_NULL else unquote(text)


def find_integer_partitions(files: Iterable[CorpusFile]) -> frozenset[str]:
    """Return the partition keys whose values are integers in all files."""
    values: dict[str, bool] = {}
    for file in files:
        for key, text in file.partitions.items():
            value = _partition_value(text)
            number = value is None or re.fullmatch(r"-?\d{1,18}", value) is not None
            values[key] = values.get(key, True) and number
    return frozenset(key for key, number in values.items() if number)


def collect_partition_values(file: CorpusFile, row_filter: RowFilter) -> Mapping[str, Any]:
    """Return the partition values of a file that `data.where` uses; they affect the tokens."""
    return {
        name: [file.partitions[name], name in row_filter.integer_partitions]
        for name in row_filter.where_columns
        if name in file.partitions
    }


HASH_BYTES = 16


def hash_text(text: memoryview) -> bytes:
    """Return a 128-bit hash of a text."""
    return hashlib.blake2b(text, digest_size=HASH_BYTES).digest()


class SeenTexts:
    """The set of texts read so far, as 128-bit hashes in a temporary SQLite file, so that memory
    does not grow with the corpus."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.unlink(missing_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-32000"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE seen (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def is_new(self, digest: bytes) -> bool:
        """Add the `hash_text` of a text; return whether it was not in the set."""
        done = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,))
        return done.rowcount == 1

    def close(self) -> None:
        self._database.close()
        self._path.unlink(missing_ok=True)
