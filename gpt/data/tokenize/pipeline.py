"""Parquet to token shards: rows -> text -> ids, an end-of-text before each document -> files.

A data set lies in a folder named after what decides its tokens: the sources' bytes, the column,
the selection, the split, the ranks, the shard length. The same again costs a look at the files'
times; anything else lies beside it. Documents are divided into training and validation by a hash
of their own text, so one stays on its side whatever arrives later and wherever it stands.

The way of the data: `sources` (which files), `parquet` (can they be used; rows), `selection`
(which rows), `chunks` (text for workers), `engine` (ids, by several processes; or `orders`, by
those of a cluster), `assembly` (shards and journal, by one). The work is done in units (`units`),
and a finished unit is never done again: not after a kill, because the journal of the unfinished
folder has it; not for another data set, because every journal is asked. Memory follows the number
of workers and the longest document.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.filters import SeenTexts
from gpt.data.parquet import ParquetSource, check_has_text
from gpt.data.shards import record_verified, write_manifest
from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.chunks import Batch, UnitEnd
from gpt.data.tokenize.encoders import Chunk, Encoded, EncoderMismatchError
from gpt.data.tokenize.job import FALLBACK, DatasetBuild, Item, build_manifest, items_of
from gpt.data.tokenize.plan import DatasetPlan, PlannedUnit, inspect_sources, make_plan
from gpt.data.tokenize.pool import Pool, available_cpus, map_in_order, open_pool
from gpt.data.tokenize.requests import Cluster, delivered
from gpt.data.tokenize.units import SPLITS, StoredUnit, UnitCounts, read_stored_units
from gpt.data.tokenize.writer import Assembly
from gpt.errors import CorpusError, DatasetError, Problem
from gpt.files import FULL_DISK, PARTIAL, sync

TEXT_BYTES_PER_WORKER = 8_000_000
"""Text for which it pays to start another process, bytes."""
ABANDONED_SECONDS = 7 * 24 * 3600
"""An unfinished folder in which nothing happened for this long goes; till then it is resumed."""
WAIT_SECONDS = 0.5
SEEN = "seen.sqlite"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizeProgress:
    """How far tokenising has come. `seconds` since it began; `tokens` with end-of-texts. What an
    earlier run or another data set had done already is among rows and tokens: `kept` of them."""

    rows_done: int
    rows_total: int
    tokens: int
    seconds: float
    rows_reused: int = 0
    tokens_reused: int = 0


Steps = Generator[TokenizeProgress, None, DatasetManifest]

# --- the two entries -----------------------------------------------------------------------------


def find_dataset(config: RunConfig) -> DatasetManifest | None:
    """The complete data set of this config, if it was made before; hashes only changed sources.

    A damaged one (a shard missing, cut short or altered) counts as none, with a warning in the
    log. Raises `CorpusError` as `tokenize_corpus` does for sources that cannot be read.
    """
    return make_plan(config).find_existing()


def tokenize_corpus(config: RunConfig, cluster: Cluster | None = None) -> Steps:
    """Make the data set of `config`, or find it; the manifest is the generator's return value.
    Units are encoded by the workers of `cluster`, if there is one, else by processes of this
    machine: the shards are the same.

    Yields progress several times a second; nothing at all when the data set is there. Left early
    or killed, it leaves no folder that could be taken for a data set, and every finished unit for
    the next start. Where another process is making the same data set, it waits for that. Raises
    `CorpusError` naming every source that cannot be used, or when a split comes out empty, and
    `DatasetError` when the disk is full.
    """
    plan = make_plan(config)
    if found := plan.find_existing():
        return found
    sources, skipped = yield from _usable(plan)
    plan.identities.save()
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(plan.folder.parent), dataset_lock(plan.folder):
        if found := plan.find_existing():
            return found
        _remove_abandoned(plan.folder)
        with contextlib.suppress(EncoderMismatchError):
            return (yield from _make(DatasetBuild(plan, sources, skipped), cluster))
        return (yield from _make(DatasetBuild(plan, sources, skipped), cluster))


def _usable(
    plan: DatasetPlan,
) -> Generator[TokenizeProgress, None, tuple[list[ParquetSource], list[Problem]]]:
    checking = inspect_sources(plan)
    while True:
        try:
            yield TokenizeProgress(0, 0, 0, next(checking))
        except StopIteration as done:
            return done.value


# --- one at a time, on a disk with room ----------------------------------------------------------


@contextlib.contextmanager
def dataset_lock(folder: Path) -> Iterator[None]:
    """Hold the data set's lock; wait for whoever has it."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is making %s: waiting for it", folder)
        lock.acquire(poll_interval=WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """A full disk, as a message."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        rule = f"the disk is full: {error.strerror}; finished units are kept"
        remedy = "free some space (2 bytes a token are needed), or set run.root to another disk; "
        remedy += "then run again"
        raise DatasetError(Problem(str(folder), "", rule, remedy)) from error


# --- the work ------------------------------------------------------------------------------------


def _make(job: DatasetBuild, cluster: Cluster | None) -> Steps:
    """Raises `EncoderMismatchError` when gigatoken was given up: then another job begins anew."""
    data = job.plan.data
    kept = [stored.entry for stored in job.kept]
    try:
        with Assembly(
            job.folder, data.tokens_per_shard, job.engine, data.max_tokens, kept
        ) as assembly:
            if len(kept) < len(job.works):
                yield from _assemble(job, assembly, cluster)
            _check_counts(job, assembly.total)
            manifest = build_manifest(job, assembly.total, assembly.close())
        (job.folder / FALLBACK).unlink(missing_ok=True)
        return publish_dataset(job.folder, job.plan.folder, manifest)
    except EncoderMismatchError as reason:
        job.restart_with_tiktoken(reason)
        raise
    finally:
        if not read_stored_units(job.folder) and not (job.folder / FALLBACK).exists():
            shutil.rmtree(job.folder, ignore_errors=True)


def _assemble(
    job: DatasetBuild, assembly: Assembly, cluster: Cluster | None
) -> Generator[TokenizeProgress, None, None]:
    """Bring every unit that is not kept into the shards, in order."""
    started = time.monotonic()
    rows_reused, tokens_reused = assembly.rows, assembly.tokens
    by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for work, stored in zip(job.works, job.kept, strict=False):
        by_file[work.source.file.name].update(stored.entry.tally.skipped)
    with _seen_texts(job) as seen, _coded(job, assembly.tokens, seen, cluster) as coded:
        for (work, item), encoded in coded:
            if isinstance(item, Batch):
                assert encoded
                assembly.take(item, encoded)
                if assembly.full:
                    item = UnitEnd(0, Counter())
            if isinstance(item, StoredUnit):
                tally = assembly.copy(item)
                rows_reused, tokens_reused = rows_reused + tally.rows, tokens_reused + tally.tokens
            if isinstance(item, UnitEnd):
                _check_unchanged(job, work)
                tally = assembly.end_unit(work.key, item)
            if not isinstance(item, Batch):
                by_file[work.source.file.name].update(tally.skipped)
                if work.unit.rows.stop == work.source.rows:
                    check_has_text(work.source, by_file.pop(work.source.file.name))
            seconds = time.monotonic() - started
            yield TokenizeProgress(
                assembly.rows, job.rows_total, assembly.tokens, seconds, rows_reused, tokens_reused
            )
            if assembly.full:
                break


def _chunk_of(item: Item) -> Chunk | None:
    return item[1].chunk if isinstance(item[1], Batch) else None


@contextlib.contextmanager
def _coded(
    job: DatasetBuild, tokens: int, seen: SeenTexts | None, cluster: Cluster | None
) -> Iterator[Iterator[tuple[Item, Encoded | None]]]:
    """Everything that there is to do, done, in order."""
    if cluster:
        with cluster() as workers:
            yield delivered(workers, job, tokens, seen)
    else:
        with _open_pool(job) as pool:
            yield map_in_order(pool, items_of(job, tokens, seen), _chunk_of)


@contextlib.contextmanager
def _open_pool(job: DatasetBuild) -> Iterator[Pool[Chunk, Encoded]]:
    tokenizer.read_verified_files(tokenizer.ranks_folder())
    text_bytes = sum(source.text_bytes for source in job.sources)
    workers = job.plan.data.workers or available_cpus()
    with open_pool(job.engine, min(workers, 1 + text_bytes // TEXT_BYTES_PER_WORKER)) as pool:
        yield pool


@contextlib.contextmanager
def _seen_texts(job: DatasetBuild) -> Iterator[SeenTexts | None]:
    seen = SeenTexts(job.folder / SEEN) if job.plan.data.drop_duplicates else None
    try:
        yield seen
    finally:
        if seen:
            seen.close()


def _check_unchanged(job: DatasetBuild, work: PlannedUnit) -> None:
    file = work.source.file
    if file.stamp() != job.plan.identities.by_file[file].stamp:
        raise CorpusError(Problem(file.name, "", "was changed while it was read", "run again"))


def _check_counts(job: DatasetBuild, total: UnitCounts) -> None:
    data = job.plan.data
    train, validation = (total.sides[name].documents for name in SPLITS)
    if train and validation:
        return
    if not train and not validation:
        reasons = [f"{count} {reason}" for reason, count in total.skipped.items() if count]
        if data.max_tokens is not None:
            reasons.append(f"max_tokens = {data.max_tokens}")
        rule = f"no row is left of {job.rows_total}: {', '.join(reasons)}"
        remedy = "ask for less in [data], or name other files"
        raise CorpusError(Problem("data.source", ", ".join(data.source), rule, remedy))
    missing, move = ("training", "lower") if not train else ("validation", "raise")
    rule = f"leaves no document for {missing}: there are {train + validation} documents"
    limit = "" if data.max_tokens is None else " or raise data.max_tokens"
    remedy = f"{move} data.validation_fraction,{limit} or add documents to data.source"
    value = str(data.validation_fraction)
    raise CorpusError(Problem("data.validation_fraction", value, rule, remedy))


# --- the end -------------------------------------------------------------------------------------


def publish_dataset(partial: Path, folder: Path, manifest: DatasetManifest) -> DatasetManifest:
    """Make `folder` of the complete `partial`: the manifest last, then the name; what is damaged
    under that name gives way."""
    write_manifest(manifest.model_copy(update={"folder": partial}))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)
    published = manifest.model_copy(update={"folder": folder})
    record_verified(published)
    return published


def _remove_abandoned(folder: Path) -> None:
    """Delete what other runs left unfinished long ago: a journal's time moves with every unit."""
    for partial in folder.parent.glob(f"*{PARTIAL}"):
        try:
            newest = max(path.stat().st_mtime for path in [partial, *partial.iterdir()])
        except OSError:
            continue
        name = partial.name.removesuffix(PARTIAL)
        if name != folder.name and time.time() - newest > ABANDONED_SECONDS:
            lock = FileLock(partial.with_name(f".{name}.lock"))
            with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                shutil.rmtree(partial, ignore_errors=True)
