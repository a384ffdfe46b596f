"""Reading the examples of a benchmark from its Parquet file, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from gpt.errors import BenchmarkError, Problem

ENDINGS = 4
_DOWNLOAD = "copy or download the benchmark's Parquet file again"
_COLUMNS = (
    "HellaSwag needs activity_label, ctx (or ctx_a and ctx_b), endings and label; LAMBADA needs "
    "text"
)


@dataclass(frozen=True)
class HellaSwagExample:
    """One example, with the texts as they are in the file."""

    activity: str
    context: str
    endings: tuple[str, ...]
    label: int


def read_hellaswag(path: str, limit: int | None = None) -> Iterator[HellaSwagExample]:
    """Yield the first `limit` examples (default: all) of a local or remote (fsspec) Parquet file.

    Columns: `activity_label`, `endings` (four texts), `label` (0 to 3, as a number or a digit), and
    `ctx_a` and `ctx_b` as in the original, or `ctx`. Raises `BenchmarkError`.
    """
    with _open_parquet(path) as parquet:
        halves = {"ctx_a", "ctx_b"} <= set(parquet.schema_arrow.names)
        context_columns = ["ctx_a", "ctx_b"] if halves else ["ctx"]
        columns = ["activity_label", *context_columns, "endings", "label"]
        for number, row in enumerate(islice(_iterate_rows(path, parquet, columns), limit)):
            for column in ("activity_label", *context_columns):
                _check(isinstance(row[column], str), path, number, column, row, "must be text")
            endings, label = row["endings"], row["label"]
            is_valid = (
                isinstance(endings, list)
                and len(endings) == ENDINGS
                and all(isinstance(ending, str) and ending.strip() for ending in endings)
            )
            _check(is_valid, path, number, "endings", row, "must be a list of four texts")
            rule = "must be 0, 1, 2 or 3, the index of the correct ending"
            _check(str(label) in ("0", "1", "2", "3"), path, number, "label", row, rule)
            # lm-evaluation-harness joins the halves like this.
            context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if halves else row["ctx"]
            yield HellaSwagExample(row["activity_label"], context, tuple(endings), int(label))


def read_lambada(path: str, limit: int | None = None) -> Iterator[str]:
    """Yield the first `limit` passages (default: all), from the column `text`.

    `path` and errors as in `read_hellaswag`.
    """
    with _open_parquet(path) as parquet:
        for number, row in enumerate(islice(_iterate_rows(path, parquet, ["text"]), limit)):
            text = row["text"]
            words = text.split(" ") if isinstance(text, str) else []
            rule = "must be text of at least two words that ends in a word"
            _check(len(words) > 1 and words[-1] != "", path, number, "text", row, rule)
            yield text


def _check(
    is_valid: bool, path: str, number: int, column: str, row: dict[str, Any], rule: str
) -> None:
    if not is_valid:
        place = f"row {number}, column {column}: {row[column]!r}"
        raise BenchmarkError(Problem(path, place[:120], rule, "correct or remove this row"))


def _iterate_rows(path: str, parquet: Any, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    found = parquet.schema_arrow.names
    problems = [
        Problem(path, column, f"no such column; the file has {', '.join(found)}", _COLUMNS)
        for column in columns
        if column not in found
    ]
    if not parquet.metadata.num_rows:
        problems.append(Problem(path, "", "has no rows", _DOWNLOAD))
    if problems:
        raise BenchmarkError(*problems)
    try:
        for batch in parquet.iter_batches(1024, columns=list(columns), use_threads=False):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        rule = f"is damaged: {_first_line(error)}"
        raise BenchmarkError(Problem(path, "", rule, _DOWNLOAD)) from error


@contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = fsspec.open(path, "rb").open()
    except Exception as error:  # each file system raises errors of its own
        rule = f"cannot be opened: {_first_line(error)}"
        remedy = "set the path or URL of the benchmark's Parquet file"
        raise BenchmarkError(Problem(path, "", rule, remedy)) from error
    with file:
        try:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            rule = f"is not a complete Parquet file: {_first_line(error)}"
            raise BenchmarkError(Problem(path, "", rule, _DOWNLOAD)) from error
        yield parquet


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
