"""The benchmarks' examples from their Parquet files, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gpt.errors import BenchmarkError, Problem

ENDINGS = 4
_GET = "copy or download the benchmark's Parquet file again"
_REMEDY = (
    "give HellaSwag with activity_label, ctx (or ctx_a and ctx_b), endings and label, and LAMBADA "
    "with text"
)


@dataclass(frozen=True)
class HellaSwagExample:
    """Texts as they stand in the file."""

    activity: str
    context: str
    endings: tuple[str, ...]
    label: int


def read_hellaswag(path: str, limit: int | None = None) -> Iterator[HellaSwagExample]:
    """The first `limit` examples. `path` is a file or an address that fsspec knows.

    Columns: `activity_label`, `endings` (four texts), `label` (0 to 3, a number or its digit), and
    `ctx_a` and `ctx_b` as in the original, else `ctx`. Raises `BenchmarkError`.
    """
    halves = {"ctx_a", "ctx_b"} <= set(_columns(path))
    columns = ["activity_label", *(["ctx_a", "ctx_b"] if halves else ["ctx"]), "endings", "label"]
    for number, row in enumerate(_rows(path, columns, limit)):
        for column in columns[:-2]:
            _require(isinstance(row[column], str), path, number, column, row, "must be text")
        endings, label = row["endings"], row["label"]
        four = isinstance(endings, list) and len(endings) == ENDINGS
        texts = four and all(isinstance(ending, str) and ending.strip() for ending in endings)
        _require(texts, path, number, "endings", row, "must be a list of four texts")
        known = str(label) in ("0", "1", "2", "3")
        _require(
            known, path, number, "label", row, "must be 0, 1, 2 or 3, the right ending's place"
        )
        # As lm-evaluation-harness joins the halves.
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if halves else row["ctx"]
        yield HellaSwagExample(row["activity_label"], context, tuple(endings), int(label))


def read_lambada(path: str, limit: int | None = None) -> Iterator[str]:
    """The first `limit` passages: column `text`. `path` as above. Raises `BenchmarkError`."""
    for number, row in enumerate(_rows(path, ["text"], limit)):
        text = row["text"]
        words = text.split(" ") if isinstance(text, str) else []
        rule = "must be text of two words at least, with a word at its end"
        _require(len(words) > 1 and words[-1] != "", path, number, "text", row, rule)
        yield text


def _require(
    sound: bool, path: str, number: int, column: str, row: dict[str, Any], rule: str
) -> None:
    if not sound:
        place = f"row {number}, column {column}: {row[column]!r}"
        raise BenchmarkError(Problem(path, place[:120], rule, "mend or leave out that row"))


def _columns(path: str) -> list[str]:
    with _opened(path) as parquet:
        return list(parquet.schema_arrow.names)


def _rows(path: str, columns: Sequence[str], limit: int | None) -> Iterator[dict[str, Any]]:
    """Rows of the named columns; one row group is held at a time."""
    import pyarrow as pa

    with _opened(path) as parquet:
        _check_columns(path, parquet.schema_arrow.names, parquet.metadata.num_rows, columns)
        left = parquet.metadata.num_rows if limit is None else limit
        for group in range(parquet.num_row_groups):
            if left <= 0:
                return
            try:
                rows = parquet.read_row_group(group, columns=list(columns), use_threads=False)
            except (pa.ArrowException, OSError) as error:
                rule = f"row group {group} is damaged: {_first_line(error)}"
                raise BenchmarkError(Problem(path, "", rule, _GET)) from error
            yield from rows.slice(0, left).to_pylist()
            left -= rows.num_rows


def _check_columns(path: str, there: Sequence[str], rows: int, wanted: Sequence[str]) -> None:
    problems = [
        Problem(path, column, f"there is no such column; there are {', '.join(there)}", _REMEDY)
        for column in wanted
        if column not in there
    ]
    if not rows:
        problems.append(Problem(path, "", "has no rows", _GET))
    if problems:
        raise BenchmarkError(*problems)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The Parquet file behind a path or an address."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = fsspec.open(path, "rb").open()
    except Exception as error:  # every store has errors of its own
        rule = f"cannot be opened: {_first_line(error)}"
        remedy = "give the path or address of the benchmark's Parquet file"
        raise BenchmarkError(Problem(path, "", rule, remedy)) from error
    with file:
        try:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            rule = f"is no whole Parquet file: {_first_line(error)}"
            raise BenchmarkError(Problem(path, "", rule, _GET)) from error
        yield parquet


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
