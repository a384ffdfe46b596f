"""Read one Parquet file: its footer, then its rows as text in small batches.

Footers of all files are checked before tokenizing. Pages are read in blocks, never as a whole
column chunk, with their checksums and the UTF-8 of the text. Errors name the file and the row group
or row.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gpt.data.filters import RowFilter
from gpt.data.sources import GET_AGAIN, CorpusFile, describe_unreadable
from gpt.data.tokenize.units import Unit, split_into_units
from gpt.errors import CorpusError, Problem, first_line

BATCH_BYTES = 1_000_000
"""Text decoded at once, estimated from the row group with the longest average row."""
BATCH_ROWS = 64
"""Most rows decoded at once; bounds a batch if some documents are very long."""
READ_BYTES = 1 << 18
"""Bytes read from the file at once."""


@dataclass(frozen=True, eq=False)
class ParquetSource:
    """A Parquet file whose footer was checked."""

    file: CorpusFile
    groups: NDArray[np.int64]
    """Rows and uncompressed bytes of the text column per row group, (groups, 2); an array because
    a corpus can have millions of row groups."""

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
        """Return the number of rows to decode at once."""
        rows, text_bytes = self.groups[self.groups[:, 0] > 0].T
        longest = max(1.0, float((text_bytes / rows).max()))
        return max(1, min(BATCH_ROWS, int(BATCH_BYTES / longest)))


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Consecutive rows of one unit, with the texts of those that pass the filter."""

    unit: int
    """Index in the requested units."""
    count: int
    """Rows read, including skipped ones."""
    texts: list[memoryview]
    skipped: Counter[str]


def inspect_parquet(file: CorpusFile, row_filter: RowFilter) -> ParquetSource:
    """Read and check the footer, without data.

    Raises `CorpusError` for a file that is not Parquet, is truncated or damaged, has no rows, or
    lacks a column, and for a text column that does not hold strings.
    """
    try:
        with _open(file) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorpusError(_describe_damage(file, error)) from error
    leaves = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    leaf = leaves.get(row_filter.column, -1)
    annotation = metadata.schema.column(leaf).logical_type.type if leaf >= 0 else ""
    if problem := _find_column_problem(file, schema, row_filter.column, annotation):
        raise CorpusError(problem)
    if not metadata.num_rows:
        raise CorpusError(Problem(file.name, "", "has no rows", "remove it from data.source"))
    row_filter.check(file, schema)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    sizes = [(g.num_rows, g.column(leaf).total_uncompressed_size) for g in groups]
    return ParquetSource(file, np.array(sizes, dtype=np.int64))


def _open(file: CorpusFile) -> pq.ParquetFile:
    return pq.ParquetFile(
        file.open(),
        buffer_size=READ_BYTES,
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
    )


def _describe_damage(file: CorpusFile, error: Exception, place: str = "") -> Problem:
    """Explain why a file cannot be read, as a whole or at a place in it."""
    try:
        head, tail = file.read_magic()
    except OSError as reason:
        return describe_unreadable(file, reason)
    if not head:
        rule = "is empty"
    elif head != b"PAR1":
        rule = "is not Parquet: a Parquet file starts with PAR1"
    elif tail != b"PAR1":
        rule = "is truncated: a complete Parquet file ends with PAR1"
    else:
        rule = f"is damaged: {first_line(error)}"
    return Problem(file.name, place, rule, GET_AGAIN)


def _find_column_problem(
    file: CorpusFile, schema: pa.Schema, column: str, annotation: str
) -> Problem | None:
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    found = [field.type for field in schema if field.name == column]
    value = column
    if len(found) > 1:
        rule = f"{len(found)} columns have this name"
    elif not found:
        rule = "no such column"
    elif _is_text(found[0], annotation):
        return None
    else:
        value, rule = f"{column} ({found[0]})", "the text column must hold strings"
    texts = [field.name for field in schema if _is_text(field.type, "")]
    remedy = (
        f"set data.text_column to one of: {', '.join(texts)}" if texts else "no column holds text"
    )
    return Problem(file.name, value, f"{rule}; the columns are {there}", remedy)


def _is_text(kind: pa.DataType, annotation: str) -> bool:
    """Whether a column holds strings, in any layout, or bytes that the file marks as text."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return annotation in ("ENUM", "JSON")
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def check_all_rows(source: ParquetSource, row_filter: RowFilter) -> None:
    """Read the whole file; raises the `CorpusError` that tokenizing would raise."""
    skipped: Counter[str] = Counter()
    for rows in read_rows(source, source.units, row_filter):
        skipped.update(rows.skipped)
    check_has_text(source, skipped)


def check_has_text(source: ParquetSource, skipped: Counter[str]) -> None:
    """Raise `CorpusError` if every row of the file is null or empty."""
    if skipped["null"] + skipped["empty"] < source.rows:
        return
    rule = f"no row has text: {skipped['null']} null, {skipped['empty']} empty"
    remedy = "remove it from data.source, or set another data.text_column"
    raise CorpusError(Problem(source.file.name, f"{source.rows} rows", rule, remedy))


def read_rows(
    source: ParquetSource, units: Sequence[Unit], row_filter: RowFilter
) -> Iterator[RowBatch]:
    """Yield the rows of `units` of a file, in order, in one pass over their row groups.

    Raises `CorpusError` for damaged pages and for text that is not UTF-8.
    """
    if not units:
        return
    first_rows = list(itertools.accumulate(source.groups[:, 0].tolist(), initial=0))
    groups = sorted({group for unit in units for group in unit.groups})
    group = row = unit = 0
    try:
        with _open(source.file) as parquet:
            columns = [row_filter.column, *row_filter.columns_in(parquet.schema_arrow)]
            for group in groups:
                row = first_rows[group]
                # One row group at a time: a reader over several holds them all until it ends.
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
                            yield _to_texts(source.file, piece, low, unit, row_filter)
                        if wanted.stop > row:
                            break
                        unit += 1
                    if unit == len(units):
                        return
    except (pa.ArrowException, OSError) as error:
        place = f"row group {group}, at or after row {row}"
        raise CorpusError(_describe_damage(source.file, error, place)) from error


def _to_texts(
    file: CorpusFile, batch: pa.RecordBatch, first_row: int, unit: int, row_filter: RowFilter
) -> RowBatch:
    array = batch.column(batch.schema.get_field_index(row_filter.column))
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
        array = array.cast(pa.large_string())
    array = array.cast(pa.large_binary())
    # Not np.asarray, which imports pandas if it is installed; that takes half a second.
    nulls = np.array(array.is_null().to_pylist(), dtype=bool)
    texts = _views(array, nulls)
    _check_utf8(file, array, texts, first_row)
    passed, skipped = row_filter.apply(file, batch, texts, nulls)
    return RowBatch(unit, len(texts), [texts[row] for row in np.flatnonzero(passed)], skipped)


def _views(array: pa.Array, nulls: NDArray[np.bool_]) -> list[memoryview]:
    """Return the bytes of every row without copying; empty for a null."""
    _, offsets, data = array.buffers()
    bounds: NDArray[np.int64] = np.frombuffer(offsets, np.int64)[
        array.offset : array.offset + len(array) + 1
    ]
    lengths = np.diff(bounds) * ~nulls  # the bytes under a null are undefined
    view = memoryview(data if data is not None else b"")
    pairs = zip(bounds[:-1].tolist(), lengths.tolist(), strict=True)
    return [view[start : start + length] for start, length in pairs]


def _check_utf8(
    file: CorpusFile, array: pa.Array, texts: Sequence[memoryview], first_row: int
) -> None:
    try:
        array.view(pa.large_string()).validate(full=True)
    except pa.ArrowInvalid:
        for row, text in enumerate(texts, first_row):
            try:
                str(text, "utf-8")
            except UnicodeDecodeError as error:
                rule = f"the text is not UTF-8 at byte {error.start}"
                remedy = "write the column as UTF-8, or remove the file from data.source"
                raise CorpusError(Problem(file.name, f"row {row}", rule, remedy)) from error
