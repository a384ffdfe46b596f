"""Parquet to token shards: rows -> text -> ids, an end-of-text token before each document -> files.

A dataset lies in a folder named after a hash of what decides its tokens: the sources' bytes, the
text column, the filters, the split, the tokenizer and the shard length. The same settings find it
again by looking at the files' times; any others build another dataset beside it. A hash of each
document's own text decides its split, so a document stays in its split whatever is added later.

The pipeline, one direction:

    plan      the files, the dataset's fingerprint, its units of work
    chunks    rows of one unit -> chunks of text
    pool      chunks -> ids in worker processes; or whole units -> ids on a cluster (`requests`)
    worker    the worker process; `encoders` is what it runs
    writer    ids -> shards and the journal of finished units
    build     the unfinished folder, from the first unit to the manifest

A finished unit is never encoded again: an interrupted build finds it in its own journal, another
dataset finds it in any other's. Memory depends on the number of workers and the longest document.
"""

import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import groupby

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.filters import SeenTexts
from gpt.data.parquet import ParquetSource, check_all_rows, check_has_text, inspect_parquet
from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.build import (
    DatasetBuild,
    dataset_lock,
    explain_full_disk,
    remove_abandoned,
)
from gpt.data.tokenize.chunks import read_chunks
from gpt.data.tokenize.encoders import Chunk, EncodedChunk
from gpt.data.tokenize.plan import DatasetPlan, PlannedUnit, make_plan
from gpt.data.tokenize.pool import Pool, available_cpus, map_in_order, open_pool
from gpt.data.tokenize.requests import OpenCluster, encode_on_cluster
from gpt.data.tokenize.tokenizer import EncoderMismatchError
from gpt.data.tokenize.units import SPLITS, StoredUnit, UnitCounts
from gpt.data.tokenize.writer import DatasetWriter
from gpt.errors import CorpusError, Problem

TEXT_BYTES_PER_WORKER = 8_000_000
"""Bytes of text for which another process pays off."""
SEEN_DATABASE = "seen.sqlite"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizeProgress:
    """How far tokenizing has come. `seconds` since the start; `tokens` includes end-of-text tokens.
    Of the rows and tokens, `rows_reused` and `tokens_reused` were encoded by an earlier run or for
    another dataset."""

    rows_done: int
    rows_total: int
    tokens: int
    seconds: float
    rows_reused: int = 0
    tokens_reused: int = 0


TokenizeSteps = Generator[TokenizeProgress, None, DatasetManifest]
EncodedUnits = Iterator[tuple[PlannedUnit, EncodedChunk | StoredUnit]]
"""For each unit in order: its encoded chunks, or where to copy it from."""


def find_dataset(config: RunConfig) -> DatasetManifest | None:
    """Find the complete dataset of this config, if it exists; hashes only changed sources.

    A damaged one (a shard missing, cut short or altered) is logged as a warning and not returned.
    Raises `CorpusError` as `tokenize_corpus` does for sources that cannot be read.
    """
    return make_plan(config).find_existing()


def tokenize_corpus(config: RunConfig, open_cluster: OpenCluster | None = None) -> TokenizeSteps:
    """Build or find the dataset of `config`; the generator returns its manifest. Units are encoded
    on a cluster if `open_cluster` is given, otherwise by processes of this machine: the shards are
    the same.

    Yields progress several times a second, nothing if the dataset exists. If interrupted, it leaves
    no folder that could be mistaken for a dataset and keeps every finished unit for the next run.
    Waits for another process that builds the same dataset. Raises `CorpusError` naming every source
    that cannot be used, or when a split is empty, and `DatasetError` when the disk is full.
    """
    plan = make_plan(config)
    if found := plan.find_existing():
        return found
    sources, skipped_files = yield from _inspect_sources(plan)
    plan.folder.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(plan.folder.parent), dataset_lock(plan.folder):
        if found := plan.find_existing():
            return found
        remove_abandoned(plan.folder)
        with contextlib.suppress(EncoderMismatchError):
            return (yield from _run(DatasetBuild(plan, sources, skipped_files), open_cluster))
        return (yield from _run(DatasetBuild(plan, sources, skipped_files), open_cluster))


def _inspect_sources(
    plan: DatasetPlan,
) -> Generator[TokenizeProgress, None, tuple[list[ParquetSource], list[Problem]]]:
    """Return the files that can be used, and the problems of those that on_bad_file = "skip" leaves
    out: these are found before tokenizing, by reading every file completely. Raises `CorpusError`
    with every problem found."""
    started = time.monotonic()
    sources: list[ParquetSource] = []
    problems = list(plan.identities.problems)
    skips_bad_files = plan.data.on_bad_file == "skip"
    for file in plan.identities.by_file:
        try:
            source = inspect_parquet(file, plan.row_filter)
            if skips_bad_files:
                check_all_rows(source, plan.row_filter)
                yield TokenizeProgress(0, 0, 0, time.monotonic() - started)
            sources.append(source)
        except CorpusError as error:
            problems += error.problems
    if problems and (not skips_bad_files or not sources):
        raise CorpusError(*problems)
    for problem in problems:
        logger.warning("file skipped: %s", problem)
    return sources, problems


def _run(build: DatasetBuild, open_cluster: OpenCluster | None) -> TokenizeSteps:
    """Raises `EncoderMismatchError` after preparing a restart with tiktoken."""
    try:
        with DatasetWriter(build) as writer:
            if not build.is_complete:
                yield from _write_units(build, writer, open_cluster)
            _check_counts(build, writer.total)
            shards = writer.finish()
        return build.publish(writer.total, shards)
    except EncoderMismatchError as reason:
        build.restart_with_tiktoken(reason)
        raise
    finally:
        build.remove_if_useless()


def _write_units(
    build: DatasetBuild, writer: DatasetWriter, open_cluster: OpenCluster | None
) -> Generator[TokenizeProgress, None, None]:
    """Write every unit that is not finished, in order."""
    started = time.monotonic()
    rows_reused, tokens_reused = writer.rows, writer.tokens
    skipped_by_file: dict[str, Counter[str]] = defaultdict(Counter)
    for unit, stored in build.finished:
        skipped_by_file[unit.source.file.name].update(stored.entry.counts.skipped)
    with _encoded_units(build, open_cluster) as units:
        for unit, content in units:
            counts: UnitCounts | None = None
            if isinstance(content, StoredUnit):
                counts = writer.copy_unit(content)
                rows_reused += counts.rows
                tokens_reused += counts.tokens
            else:
                writer.write(content)
                if content.ends_unit or writer.is_full:
                    _check_unchanged(build, unit)
                    counts = writer.end_unit(unit.key)
            if counts:
                skipped_by_file[unit.source.file.name].update(counts.skipped)
                if unit.unit.rows.stop == unit.source.rows:
                    check_has_text(unit.source, skipped_by_file.pop(unit.source.file.name))
            seconds = time.monotonic() - started
            yield TokenizeProgress(
                writer.rows, build.total_rows, writer.tokens, seconds, rows_reused, tokens_reused
            )
            if writer.is_full:
                break


def _check_unchanged(build: DatasetBuild, unit: PlannedUnit) -> None:
    file = unit.source.file
    if file.stamp() != build.plan.identities.by_file[file].stamp:
        raise CorpusError(Problem(file.name, "", "changed while it was read", "run again"))


def _check_counts(build: DatasetBuild, total: UnitCounts) -> None:
    """Raises `CorpusError` where a split has no document."""
    data = build.plan.data
    train, validation = (total.splits[name].documents for name in SPLITS)
    if train and validation:
        return
    if not train and not validation:
        reasons = [f"{count} {reason}" for reason, count in total.skipped.items() if count]
        if data.max_tokens is not None:
            reasons.append(f"max_tokens = {data.max_tokens}")
        rule = f"no row is left: {', '.join(reasons)} (of {build.total_rows} rows)"
        remedy = "relax the filters in [data], or name other files"
        raise CorpusError(Problem("data.source", ", ".join(data.source), rule, remedy))
    missing, change = ("training", "lower") if not train else ("validation", "raise")
    rule = f"leaves no document for {missing}: there are {train + validation} documents"
    limit = "" if data.max_tokens is None else " or raise data.max_tokens"
    remedy = f"{change} data.validation_fraction,{limit} or add documents to data.source"
    value = str(data.validation_fraction)
    raise CorpusError(Problem("data.validation_fraction", value, rule, remedy))


@contextlib.contextmanager
def _encoded_units(build: DatasetBuild, open_cluster: OpenCluster | None) -> Iterator[EncodedUnits]:
    """Start the pool or the cluster, and yield all units that are not finished."""
    with contextlib.ExitStack() as stack:
        seen = None
        if build.plan.data.drop_duplicates:
            seen = stack.enter_context(contextlib.closing(SeenTexts(build.folder / SEEN_DATABASE)))
            for unit, _ in build.finished:
                build.add_to_seen(unit, seen)
        if open_cluster:
            yield encode_on_cluster(stack.enter_context(open_cluster()), build, seen)
            return
        tokenizer.read_verified_files(tokenizer.ranks_folder())
        text_bytes = sum(source.text_bytes for source in build.sources)
        workers = build.plan.data.workers or available_cpus()
        workers = min(workers, 1 + text_bytes // TEXT_BYTES_PER_WORKER)
        yield _encode_here(stack.enter_context(open_pool(build.engine, workers)), build, seen)


def _encode_here(
    pool: Pool[Chunk, EncodedChunk], build: DatasetBuild, seen: SeenTexts | None
) -> EncodedUnits:
    for (unit, stored), encoded in map_in_order(pool, _read_units(build, seen)):
        content = stored or encoded
        assert content
        yield unit, content


def _read_units(
    build: DatasetBuild, seen: SeenTexts | None
) -> Iterator[tuple[tuple[PlannedUnit, StoredUnit | None], Chunk | None]]:
    """The chunks of each unit, or where to copy it from. Neighboring units of a file are read in
    one pass."""
    for (_, is_stored), group in groupby(
        build.remaining_units(), key=lambda item: (id(item[0].source), item[1] is not None)
    ):
        if is_stored:
            for unit, stored in group:
                build.add_to_seen(unit, seen)
                yield (unit, stored), None
            continue
        units = [unit for unit, _ in group]
        for index, chunk in read_chunks(
            units[0].source,
            [unit.unit for unit in units],
            build.plan.row_filter,
            build.plan.data.validation_fraction,
            seen.is_new if seen else None,
        ):
            yield (units[index], None), chunk
