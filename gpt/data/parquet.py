"""One Parquet file: can it be used, and its rows as text, a few at a time.

Footers are read for all files before any work; pages are read in pieces (never a whole column
chunk), their checksums and the texts' UTF-8 are checked on the way. What is wrong is told by file
and by row group or row.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gpt.data.filters import RowFilter
from gpt.data.sources import GET_AGAIN, CorpusFile, unreadable
from gpt.data.tokenize.units import Unit, split_into_units
from gpt.errors import CorpusError, Problem

BATCH_BYTES = 1_000_000
"""Text decoded at once, bytes, by the average row of the row group with the longest ones."""
BATCH_ROWS = 64
"""Most rows decoded at once: a batch holds few documents, however long some of them are."""
READ_BYTES = 1 << 18
"""Read from the file at once."""


@dataclass(frozen=True, eq=False)
class ParquetSource:
    """A Parquet file that passed inspection."""

    file: CorpusFile
    groups: NDArray[np.int64]
    """Rows and uncompressed bytes of the text column, for each row group: (groups, 2). An array,
    because a corpus can have millions of them."""

    @property
    def rows(self) -> int:
        return int(self.groups[:, 0].sum())

    @property
    def text_bytes(self) -> int:
        return int(self.groups[:, 1].sum())

    @property
    def units(self) -> list[Unit]:
        return list(split_into_units(self.groups.tolist()))

    def batch_rows(self) -> int:
        rows, text_bytes = self.groups[self.groups[:, 0] > 0].T
        return max(
            1, min(BATCH_ROWS, int(BATCH_BYTES / max(1.0, float((text_bytes / rows).max()))))
        )


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows in a row of one unit; only those that were selected have a text."""

    unit: int
    """Which of the units that were asked for."""
    count: int
    texts: list[memoryview]
    skipped: Counter[str]


# --- can it be used ------------------------------------------------------------------------------


def inspect(file: CorpusFile, selection: RowFilter) -> ParquetSource:
    """Read the footer, no data. Raises `CorpusError` for a file that is not Parquet, is cut short
    or damaged, has no rows, lacks a column, or has it in another type than text."""
    try:
        with _open(file) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorpusError(_why_not(file, error)) from error
    leaves = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    column = selection.column
    annotation = ""
    if column in leaves:
        annotation = metadata.schema.column(leaves[column]).logical_type.type
    if problem := _column_problem(file, schema, column, annotation):
        raise CorpusError(problem)
    if not metadata.num_rows:
        raise CorpusError(Problem(file.name, "", "has no rows", "leave it out of data.source"))
    selection.check(file, schema)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    leaf = leaves[column]
    sizes = [(g.num_rows, g.column(leaf).total_uncompressed_size) for g in groups]
    return ParquetSource(file, np.array(sizes, dtype=np.int64))


def _open(file: CorpusFile) -> pq.ParquetFile:
    return pq.ParquetFile(
        file.open(),
        buffer_size=READ_BYTES,
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
    )


def _why_not(file: CorpusFile, error: Exception) -> Problem:
    """Why a file cannot be opened, told from its first and last four bytes."""
    try:
        head, tail = file.ends()
    except OSError as reason:
        return unreadable(file, reason)
    if not head:
        rule = "is empty"
    elif head != b"PAR1":
        rule = "is not Parquet: such a file begins with PAR1"
    elif tail != b"PAR1":
        rule = "is cut short: a whole Parquet file ends with PAR1"
    else:
        rule = f"is damaged: {_first_line(error)}"
    return Problem(file.name, "", rule, GET_AGAIN)


def _column_problem(
    file: CorpusFile, schema: pa.Schema, column: str, annotation: str
) -> Problem | None:
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    found = [field for field in schema if field.name == column]
    if len(found) == 1 and _is_text(found[0].type, annotation):
        return None
    if not found:
        value, rule = column, "there is no such column"
    elif len(found) > 1:
        value, rule = column, f"{len(found)} columns have that name"
    else:
        value, rule = f"{column} ({found[0].type})", "the text column must hold strings"
    texts = [field.name for field in schema if _is_text(field.type, "")]
    remedy = f"set data.text_column to one of: {', '.join(texts)}" if texts else "no column is text"
    return Problem(file.name, value, f"{rule}; the columns are {there}", remedy)


def _is_text(kind: pa.DataType, annotation: str) -> bool:
    """Strings in every layout, and bytes that the file itself calls text."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return annotation in ("ENUM", "JSON")
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_all_rows(source: ParquetSource, selection: RowFilter) -> None:
    """Read all of a file as tokenising will; raises the `CorpusError` that it would."""
    skipped: Counter[str] = Counter()
    for rows in read_rows(source, source.units, selection):
        skipped.update(rows.skipped)
    check_has_text(source, skipped)


def check_has_text(source: ParquetSource, skipped: Counter[str]) -> None:
    """Raises `CorpusError` for a file that has no text in any row."""
    if skipped["null"] + skipped["empty"] < source.rows:
        return
    rule = f"no row has text: {skipped['null']} null, {skipped['empty']} empty"
    remedy = "leave it out of data.source, or name another data.text_column"
    raise CorpusError(Problem(source.file.name, f"{source.rows} rows", rule, remedy))


# --- rows ----------------------------------------------------------------------------------------


def read_rows(source: ParquetSource, units: Sequence[Unit], selection: RowFilter) -> Iterator[Rows]:
    """The rows of some units of a file, in order, in one pass over their row groups.

    Raises `CorpusError` for pages that cannot be read and for text that is not UTF-8.
    """
    if not units:
        return
    first_rows = list(itertools.accumulate(source.groups[:, 0].tolist(), initial=0))
    row = 0
    groups = sorted({group for unit in units for group in unit.groups})
    unit = 0
    try:
        with _open(source.file) as parquet:
            columns = [selection.column, *selection.columns_in(parquet.schema_arrow)]
            for group in groups:
                row = first_rows[group]
                # One at a time: a reader over several keeps what it read till the last is done.
                for batch in parquet.iter_batches(
                    batch_size=source.batch_rows(),
                    row_groups=[group],
                    columns=list(dict.fromkeys(columns)),
                    use_threads=False,
                ):
                    start, row = row, row + batch.num_rows
                    while unit < len(units) and units[unit].rows.start < row:
                        wanted = units[unit].rows
                        low, high = max(wanted.start, start), min(wanted.stop, row)
                        if low < high:
                            piece = batch.slice(low - start, high - low)
                            yield _selected(source.file, piece, low, unit, selection)
                        if wanted.stop > row:
                            break
                        unit += 1
                    if unit == len(units):
                        return
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(_damaged(source, row, error)) from error


def _damaged(source: ParquetSource, row: int, error: Exception) -> Problem:
    try:
        source.file.ends()
    except OSError as reason:
        return unreadable(source.file, reason)
    group, first = 0, 0
    for group, rows in enumerate(source.groups[:, 0].tolist()):  # noqa: B007
        if row < first + rows:
            break
        first += rows
    place = f"row group {group}, at or after row {row}"
    return Problem(source.file.name, place, f"is damaged: {_first_line(error)}", GET_AGAIN)


def _selected(
    file: CorpusFile, batch: pa.RecordBatch, first_row: int, unit: int, selection: RowFilter
) -> Rows:
    array = batch.column(batch.schema.get_field_index(selection.column))
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
        array = array.cast(pa.large_string())
    array = array.cast(pa.large_binary())
    # Not np.asarray: that would import pandas, if it is installed, for half a second.
    nulls = np.array(array.is_null().to_pylist(), dtype=bool)
    texts = _views(array, nulls)
    _check_utf8(file, array, texts, first_row)
    kept, skipped = selection.select(file, batch, texts, nulls)
    return Rows(unit, len(texts), [texts[row] for row in np.flatnonzero(kept)], skipped)


def _views(array: pa.Array, nulls: NDArray[np.bool_]) -> list[memoryview]:
    """The bytes of every row, in place; nothing for a null."""
    _, offsets, data = array.buffers()
    bounds: NDArray[np.int64] = np.frombuffer(offsets, np.int64)[
        array.offset : array.offset + len(array) + 1
    ]
    lengths = np.diff(bounds) * ~nulls  # the bytes that a null may stand for are nobody's text
    view = memoryview(data if data is not None else b"")
    pairs = zip(bounds[:-1].tolist(), lengths.tolist(), strict=True)
    return [view[start : start + length] for start, length in pairs]


def _check_utf8(
    file: CorpusFile, array: pa.Array, texts: Sequence[memoryview], first_row: int
) -> None:
    try:
        array.view(pa.large_string()).validate(full=True)
        return
    except pa.ArrowInvalid:
        pass
    for row, text in enumerate(texts, first_row):
        try:
            str(text, "utf-8")
        except UnicodeDecodeError as error:
            rule = f"the text is not UTF-8 at its byte {error.start}"
            remedy = "write the column as UTF-8 again, or leave the file out of data.source"
            raise CorpusError(Problem(file.name, f"row {row}", rule, remedy)) from error
