"""Reading the examples of a benchmark from its Parquet file."""

import io
from dataclasses import dataclass
from typing import Any

from gpt.errors import BenchmarkError, Problem, first_line

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


def read_hellaswag(path: str, limit: int | None = None) -> list[HellaSwagExample]:
    """Read the first `limit` examples (default: all) of a local or remote (fsspec) Parquet file.

    Columns: `activity_label`, `endings` (four texts), `label` (0 to 3, as a number or a digit), and
    `ctx_a` and `ctx_b` as in the original, or `ctx`. Raises `BenchmarkError`.
    """
    original = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    columns = ("activity_label", "ctx", "endings", "label")
    examples = []
    for number, row in enumerate(_read_rows(path, original, columns, limit)):
        endings = row["endings"] if isinstance(row["endings"], list) else []
        is_valid = len(endings) == ENDINGS and all(
            isinstance(e, str) and e.strip() for e in endings
        )
        _check(is_valid, path, number, "endings", row, "must be a list of four texts")
        rule = "must be 0, 1, 2 or 3, the index of the correct ending"
        _check(str(row["label"]) in ("0", "1", "2", "3"), path, number, "label", row, rule)
        for column in row.keys() - {"endings", "label"}:
            _check(isinstance(row[column], str), path, number, column, row, "must be text")
        # lm-evaluation-harness joins the halves like this.
        halves = "ctx_a" in row
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if halves else row["ctx"]
        activity, label = row["activity_label"], int(row["label"])
        examples.append(HellaSwagExample(activity, context, tuple(endings), label))
    return examples


def read_lambada(path: str, limit: int | None = None) -> list[str]:
    """Read the first `limit` passages (default: all), from the column `text`.

    `path` and errors as in `read_hellaswag`.
    """
    texts = []
    for number, row in enumerate(_read_rows(path, ("text",), ("text",), limit)):
        text = row["text"]
        words = text.split(" ") if isinstance(text, str) else []
        rule = "must be text of at least two words that ends in a word"
        _check(len(words) > 1 and words[-1] != "", path, number, "text", row, rule)
        texts.append(text)
    return texts


def _check(
    is_valid: bool, path: str, number: int, column: str, row: dict[str, Any], rule: str
) -> None:
    if not is_valid:
        place = f"row {number}, column {column}: {row[column]!r}"
        raise BenchmarkError(Problem(path, place[:120], rule, "correct or remove this row"))


def _read_rows(
    path: str, preferred: tuple[str, ...], columns: tuple[str, ...], limit: int | None
) -> list[dict[str, Any]]:
    """Read the `preferred` columns if the file has them all, else `columns`."""
    import fsspec
    import polars as pl

    try:
        with fsspec.open(path, "rb") as file:
            content = io.BytesIO(file.read())
    except Exception as error:  # each file system raises errors of its own
        rule = f"cannot be opened: {first_line(error)}"
        remedy = "set the path or URL of the benchmark's Parquet file"
        raise BenchmarkError(Problem(path, "", rule, remedy)) from error
    try:
        found = list(pl.read_parquet_schema(content))
        wanted = preferred if set(preferred) <= set(found) else columns
        if missing := [column for column in wanted if column not in found]:
            rule = f"no such column; the file has {', '.join(found)}"
            raise BenchmarkError(*(Problem(path, column, rule, _COLUMNS) for column in missing))
        content.seek(0)
        table = pl.read_parquet(content, columns=list(wanted), n_rows=limit)
    except (pl.exceptions.PolarsError, OSError) as error:
        rule = f"is not a complete Parquet file: {first_line(error)}"
        raise BenchmarkError(Problem(path, "", rule, _DOWNLOAD)) from error
    if table.is_empty():
        raise BenchmarkError(Problem(path, "", "has no rows", _DOWNLOAD))
    return table.to_dicts()
