"""Parquet to token shards: rows -> text -> ids, an end-of-text before each document -> files.

A data set lies in a folder named after what decides its tokens: the sources' bytes, the column,
the split, the ranks, the shard length. The same again costs a hash look-up; anything else lies
beside it. Documents are divided into training and validation by a hash of their own text, so one
stays on its side whatever arrives later and wherever it stands.

Inside: `find_sources` (which files), `inspect` (can they be used, all problems at once), `units`
(pieces of work that know nothing of each other), `encode_unit` (rows to ids, pure) and an ordered
writer. Memory holds one batch of rows, whatever the size of files and row groups.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gpt.artifacts import DatasetManifest, Shard, SourceFile, Split
from gpt.config import RunConfig, fingerprint
from gpt.data import tokenizer
from gpt.data.shards import (
    MANIFEST,
    ShardWriter,
    read_manifest,
    write_manifest,
)
from gpt.errors import CorpusError, DatasetError, Problem
from gpt.files import PARTIAL, sha256_of, sync, write_text

FORMAT_VERSION = 1
"""Raised when the same sources and settings would give other shards."""
UNIT_BYTES = 64_000_000
"""Text in one unit of work, bytes, as far as whole row groups allow."""
BATCH_BYTES = 4_000_000
"""Text decoded at once, bytes, by the row group's average row."""
BATCH_ROWS = 1_024
"""Most rows decoded at once, so that progress is told several times a second."""
ABANDONED_SECONDS = 24 * 3600
"""An unfinished folder in which nothing was begun for this long belongs to a run that died."""
HASHES = "source-hashes.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizeProgress:
    """How far tokenising has come. `seconds` since it began; `tokens` with end-of-texts."""

    rows_done: int
    rows_total: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class RowGroup:
    rows: int
    text_bytes: int
    """Uncompressed size of the text column in the file."""


@dataclass(frozen=True)
class Source:
    """A Parquet file that passed inspection."""

    path: Path
    groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.groups)


@dataclass(frozen=True)
class Unit:
    """Work that one process can do alone: a range of row groups of one file."""

    path: Path
    column: str
    groups: range
    first_row: int
    batch_rows: int


@dataclass(frozen=True, eq=False)
class Side:
    """What one batch gives to training or to validation."""

    ids: NDArray[np.uint32]
    documents: int
    text_bytes: int


@dataclass(frozen=True, eq=False)
class Encoded:
    """One batch of rows as ids, in the order of the file."""

    rows: int
    train: Side
    validation: Side
    skipped: Mapping[str, int]


# --- the two entries -----------------------------------------------------------------------------


def find_dataset(config: RunConfig) -> DatasetManifest | None:
    """The complete data set of this config, if it was made before; hashes only changed sources.

    A damaged one (a shard missing or cut short) counts as none, with a warning in the log.
    Raises `CorpusError` as `tokenize_corpus` does for sources that cannot be used.
    """
    return _plan(config).existing()


def tokenize_corpus(config: RunConfig) -> Generator[TokenizeProgress, None, DatasetManifest]:
    """Make the data set of `config`, or find it; the manifest is the generator's return value.

    Yields progress several times a second; nothing at all when the data set is there. Left early
    or killed, it leaves no folder that could be taken for a data set. Raises `CorpusError` naming
    every source that cannot be used, or when a split comes out empty.
    """
    plan = _plan(config)
    if found := plan.existing():
        return found
    _remove_abandoned(plan.folder.parent)
    partial = plan.folder.with_name(f"{plan.folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    partial.mkdir()
    try:
        manifest = yield from _write_dataset(plan, partial)
        _publish(partial, plan.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest.model_copy(update={"folder": plan.folder})


@dataclass(frozen=True)
class _Plan:
    """All that is known before the first row is read."""

    config: RunConfig
    sources: tuple[Source, ...]
    hashes: tuple[str, ...]
    stamps: tuple[str, ...]
    fingerprint: str
    folder: Path

    def existing(self) -> DatasetManifest | None:
        if not (self.folder / MANIFEST).is_file():
            return None
        try:
            return read_manifest(self.folder)
        except DatasetError as error:
            logger.warning("%s\nIt is made anew from its sources.", error)
            return None


def _plan(config: RunConfig) -> _Plan:
    data = config.data
    sources = inspect(find_sources(data.source), data.text_column)
    datasets = config.run.root / "datasets"
    datasets.mkdir(parents=True, exist_ok=True)
    stamps = tuple(_stamp(source.path) for source in sources)
    hashes = _hashes([source.path for source in sources], stamps, datasets / HASHES)
    name = fingerprint(
        {
            "format": FORMAT_VERSION,
            "sources": hashes,
            "ranks": tokenizer.RANKS_SHA256,
            "text_column": data.text_column,
            "validation_fraction": data.validation_fraction,
            "tokens_per_shard": data.tokens_per_shard,
        }
    )
    return _Plan(config, sources, hashes, stamps, name, datasets / name[:16])


# --- which files ---------------------------------------------------------------------------------


def find_sources(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Files, globs (`**` at any depth) and directories (every `*.parquet` below) as files.

    In the order given, sorted within each, a file named twice taken once. Raises `CorpusError`
    with every entry that names nothing.
    """
    found: dict[Path, Path] = {}
    problems = []
    for pattern in patterns:
        paths = [] if "://" in pattern else _matches(Path(pattern).expanduser())
        for path in paths:
            found.setdefault(path.resolve(), path)
        if not paths:
            problems.append(_nothing(pattern))
    if problems:
        raise CorpusError(*problems)
    return tuple(found.values())


def _matches(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(below for below in path.rglob("*.parquet") if below.is_file())
    # Path.glob takes no absolute pattern.
    matched = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    return [file for match in matched if match != path for file in _matches(match)]


def _nothing(pattern: str) -> Problem:
    if "://" in pattern:
        rule, remedy = "is not on this machine", "download it first and name the local files"
    elif Path(pattern).expanduser().is_dir():
        rule, remedy = "holds no *.parquet file", "name a directory with Parquet files below it"
    elif glob.has_magic(pattern):
        rule, remedy = "matches no file", f"patterns start from {Path.cwd()}; mend this one"
    else:
        rule, remedy = "there is no such file", f"paths start from {Path.cwd()}; mend this one"
    return Problem("data.source", pattern, rule, remedy)


# --- can they be used ----------------------------------------------------------------------------


def inspect(paths: Iterable[Path], column: str) -> tuple[Source, ...]:
    """Read every footer, no data. Raises `CorpusError` with each file that is not Parquet, is cut
    short or damaged, lacks the column, or has it in another type than text."""
    sources: list[Source] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            sources.append(_inspected(path, column))
        except CorpusError as error:
            problems += error.problems
    if problems:
        raise CorpusError(*problems)
    return tuple(sources)


def _inspected(path: Path, column: str) -> Source:
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(_unreadable(path, error)) from error
    if problem := _column_problem(path, schema, column):
        raise CorpusError(problem)
    leaf = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return Source(
        path,
        tuple(RowGroup(g.num_rows, g.column(leaf).total_uncompressed_size) for g in groups),
    )


def _unreadable(path: Path, error: Exception) -> Problem:
    """Why a file cannot be opened, told from its first and last four bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(-min(4, path.stat().st_size), os.SEEK_END)
            tail = file.read(4)
    except OSError as reason:
        rule = f"cannot be read: {reason.strerror}"
        return Problem(str(path), "", rule, "make it readable, or leave it out of data.source")
    if not head:
        rule = "is empty"
    elif head != b"PAR1":
        rule = "is not Parquet: such a file begins with PAR1"
    elif tail != b"PAR1":
        rule = "is cut short: a whole Parquet file ends with PAR1"
    else:
        rule = f"is damaged: {_first_line(error)}"
    return Problem(str(path), "", rule, "copy or download it again, or leave it out of data.source")


def _column_problem(path: Path, schema: pa.Schema, column: str) -> Problem | None:
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    found = [field for field in schema if field.name == column]
    if len(found) == 1 and _is_text(found[0].type):
        return None
    if not found:
        value, rule = column, "there is no such column"
    elif len(found) > 1:
        value, rule = column, f"{len(found)} columns have that name"
    else:
        value, rule = f"{column} ({found[0].type})", "the text column must hold strings"
    texts = [field.name for field in schema if _is_text(field.type)]
    remedy = f"set data.text_column to one of: {', '.join(texts)}" if texts else "no column is text"
    return Problem(str(path), value, f"{rule}; the columns are {there}", remedy)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- sources' hashes -----------------------------------------------------------------------------


def _stamp(path: Path) -> str:
    """What changes whenever a file is written: size and time, cheap to ask."""
    try:
        status = path.stat()
    except OSError as error:
        raise CorpusError(_unreadable(path, error)) from error
    return f"{status.st_size}:{status.st_mtime_ns}"


def _hashes(paths: Sequence[Path], stamps: Sequence[str], cache: Path) -> tuple[str, ...]:
    """SHA-256 of every file, taken from `cache` where the stamp is the one it was made under."""
    known = _read_hashes(cache)
    keys = [str(path.resolve()) for path in paths]
    fresh = {
        key: {"stamp": stamp, "sha256": sha256_of(path)}
        for key, path, stamp in zip(keys, paths, stamps, strict=True)
        if known.get(key, {}).get("stamp") != stamp
    }
    if fresh:
        known |= fresh
        write_text(cache, json.dumps(known, indent=1, sort_keys=True))
    return tuple(known[key]["sha256"] for key in keys)


def _read_hashes(cache: Path) -> dict[str, Any]:
    """Only a memory: one that cannot be read is as good as none."""
    try:
        known = json.loads(cache.read_bytes())
        return {key: entry for key, entry in known.items() if {"stamp", "sha256"} <= entry.keys()}
    except (OSError, ValueError, AttributeError):
        return {}


# --- rows to ids ---------------------------------------------------------------------------------


def units(source: Source, column: str) -> Iterator[Unit]:
    """Cut a file into units of about `UNIT_BYTES`, in order."""
    start = first_row = rows = size = 0
    for index, group in enumerate(source.groups):
        rows, size = rows + group.rows, size + group.text_bytes
        if size >= UNIT_BYTES or index + 1 == len(source.groups):
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))
            yield Unit(source.path, column, range(start, index + 1), first_row, batch_rows)
            start, first_row, rows, size = index + 1, first_row + rows, 0, 0


def encode_unit(unit: Unit, validation_fraction: float) -> Iterator[Encoded]:
    """The rows of a unit as ids, batch by batch. Depends on its arguments alone.

    Raises `CorpusError` for pages that cannot be read and for text that is not UTF-8.
    """
    row = unit.first_row
    for texts in _batches(unit):
        yield _encode_rows(texts, validation_fraction, unit.path, row)
        row += len(texts)


def _batches(unit: Unit) -> Iterator[list[bytes | None]]:
    try:
        with pq.ParquetFile(
            unit.path, buffer_size=1 << 20, page_checksum_verification=True
        ) as file:
            for batch in file.iter_batches(
                batch_size=unit.batch_rows, row_groups=list(unit.groups), columns=[unit.column]
            ):
                text = batch.column(0).cast(pa.large_string())
                yield text.cast(pa.large_binary()).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(_unreadable(unit.path, error)) from error


def _encode_rows(
    texts: Sequence[bytes | None], validation_fraction: float, path: Path, first_row: int
) -> Encoded:
    train, validation = _SideBuilder(), _SideBuilder()
    skipped: Counter[str] = Counter()
    for row, raw in enumerate(texts, first_row):
        if not raw:
            skipped["null" if raw is None else "empty"] += 1
            continue
        try:
            ids = tokenizer.encode(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            rule = f"the text is not UTF-8 at its byte {error.start}"
            remedy = "write the column as UTF-8 again, or leave the file out of data.source"
            raise CorpusError(Problem(str(path), f"row {row}", rule, remedy)) from error
        (validation if is_validation(raw, validation_fraction) else train).add(raw, ids)
    return Encoded(len(texts), train.side(), validation.side(), skipped)


def is_validation(text: bytes, fraction: float) -> bool:
    """Whether a document, as UTF-8, is kept out of training: by its own text and nothing else."""
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


class _SideBuilder:
    _SEPARATOR = np.array([tokenizer.END_OF_TEXT], dtype=np.uint32)

    def __init__(self) -> None:
        self._pieces: list[NDArray[np.uint32]] = []
        self._text_bytes = 0

    def add(self, raw: bytes, ids: NDArray[np.uint32]) -> None:
        self._pieces += [self._SEPARATOR, ids]
        self._text_bytes += len(raw)

    def side(self) -> Side:
        empty = np.empty(0, dtype=np.uint32)
        return Side(
            np.concatenate([empty, *self._pieces]), len(self._pieces) // 2, self._text_bytes
        )


# --- ids to files --------------------------------------------------------------------------------


class _Tally:
    """What was counted on the way, for progress and for the manifest."""

    def __init__(self) -> None:
        self.rows = self.tokens = 0
        self.skipped = {"null": 0, "empty": 0}
        self.sides = {"train": Counter[str](), "validation": Counter[str]()}

    def add(self, batch: Encoded) -> None:
        self.rows += batch.rows
        for reason, count in batch.skipped.items():
            self.skipped[reason] += count
        for name, side in (("train", batch.train), ("validation", batch.validation)):
            self.tokens += side.ids.size
            self.sides[name].update(
                documents=side.documents, tokens=side.ids.size, text_bytes=side.text_bytes
            )

    def split(self, name: str, shards: tuple[Shard, ...]) -> Split:
        counts = self.sides[name]
        return Split(
            shards=shards,
            documents=counts["documents"],
            tokens=counts["tokens"],
            text_bytes=counts["text_bytes"],
        )


def _write_dataset(plan: _Plan, folder: Path) -> Generator[TokenizeProgress, None, DatasetManifest]:
    data = plan.config.data
    started = time.monotonic()
    rows_total = sum(source.rows for source in plan.sources)
    tally = _Tally()
    with (
        ShardWriter(folder, "train", data.tokens_per_shard) as train,
        ShardWriter(folder, "validation", data.tokens_per_shard) as validation,
    ):
        for source in plan.sources:
            for unit in units(source, data.text_column):
                for batch in encode_unit(unit, data.validation_fraction):
                    train.write(batch.train.ids)
                    validation.write(batch.validation.ids)
                    tally.add(batch)
                    seconds = time.monotonic() - started
                    yield TokenizeProgress(tally.rows, rows_total, tally.tokens, seconds)
        _check_counts(plan, tally)
        _check_unchanged(plan)
        manifest = DatasetManifest(
            fingerprint=plan.fingerprint,
            folder=folder,
            tokenizer=tokenizer.NAME,
            ranks_sha256=tokenizer.RANKS_SHA256,
            text_column=data.text_column,
            validation_fraction=data.validation_fraction,
            sources=tuple(
                SourceFile(
                    path=str(source.path),
                    size_bytes=int(stamp.partition(":")[0]),
                    sha256=sha256,
                    rows=source.rows,
                )
                for source, sha256, stamp in zip(
                    plan.sources, plan.hashes, plan.stamps, strict=True
                )
            ),
            train=tally.split("train", train.close()),
            validation=tally.split("validation", validation.close()),
            skipped=tally.skipped,
        )
    write_manifest(manifest)
    return manifest


def _check_counts(plan: _Plan, tally: _Tally) -> None:
    data = plan.config.data
    train, validation = (tally.sides[name]["documents"] for name in ("train", "validation"))
    if train and validation:
        return
    if not train and not validation:
        rule = f"no row has text: {tally.skipped['null']} null, {tally.skipped['empty']} empty"
        remedy = "name other files, or another data.text_column"
        raise CorpusError(Problem("data.source", ", ".join(data.source), rule, remedy))
    missing, move = ("training", "lower") if not train else ("validation", "raise")
    rule = f"leaves no document for {missing}: the sources hold {train + validation} documents"
    remedy = f"{move} data.validation_fraction, or add documents to data.source"
    value = str(data.validation_fraction)
    raise CorpusError(Problem("data.validation_fraction", value, rule, remedy))


def _check_unchanged(plan: _Plan) -> None:
    changed = [
        Problem(str(source.path), "", "was changed while it was read", "run again")
        for source, stamp in zip(plan.sources, plan.stamps, strict=True)
        if _stamp(source.path) != stamp
    ]
    if changed:
        raise CorpusError(*changed)


def _publish(partial: Path, folder: Path) -> None:
    """Give a complete data set its name. Another process may have made the same one meanwhile:
    then that one stays; what is damaged or incomplete gives way."""
    try:
        read_manifest(folder)
    except DatasetError:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync(folder.parent)


def _remove_abandoned(datasets: Path) -> None:
    """Delete what killed runs left: a folder's time moves whenever a shard is begun or done."""
    for folder in datasets.glob(f"*{PARTIAL}"):
        try:
            old = time.time() - folder.stat().st_mtime > ABANDONED_SECONDS
        except FileNotFoundError:
            continue
        if old and folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
