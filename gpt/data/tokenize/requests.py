"""A unit of work as an order that another machine can carry out, and what it sends back.

An order is small: which rows of which file, and how. The worker reads them by itself, so it must
reach the files under the names that data.source gives them. A delivery is the ids of one unit (8 MB
for 16 MB of text), in the very batches that a process of this machine would have given, so that
the one writer does with them what it always does and the shards are the same. Nothing here knows
which cluster it is.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gpt.data.filters import HASH_BYTES, RowFilter, SeenTexts, hash_text
from gpt.data.parquet import ParquetSource
from gpt.data.tokenize.chunks import Batch, UnitEnd, chunks
from gpt.data.tokenize.encoders import Encoded, Encoder, EngineName, encode_chunk
from gpt.data.tokenize.job import DatasetBuild, Item, planned, remember, remember_kept
from gpt.data.tokenize.plan import FORMAT_VERSION, PlannedUnit
from gpt.data.tokenize.pool import Pool, map_in_order, resolve_engine
from gpt.data.tokenize.units import StoredUnit, Unit
from gpt.data.tokenize.worker import load_encoder
from gpt.errors import CorpusError, Problem


@dataclass(frozen=True)
class EncodeRequest:
    """All that decides what comes of a unit."""

    source: ParquetSource
    size_bytes: int
    """Of the file, as it is where the order was given."""
    unit: Unit
    selection: RowFilter
    validation_fraction: float
    engine: EngineName
    hashed: bool
    """Whether the hash of every document is wanted, to tell duplicates among all units."""
    format: int = FORMAT_VERSION


@dataclass(frozen=True, eq=False)
class EncodeResult:
    """What came of an order: the batches of its unit, without their text, and its end."""

    batches: list[tuple[Batch, Encoded]]
    end: UnitEnd
    hashes: bytes
    """Of every document in order, `HASH_BYTES` each, where they were wanted."""


Cluster = Callable[[], contextlib.AbstractContextManager[Pool[EncodeRequest, EncodeResult]]]
"""Opens the workers for as long as they are needed."""


# --- where the work is done ----------------------------------------------------------------------


def encode_unit(order: EncodeRequest) -> EncodeResult:
    """Read the rows of an order and encode them.

    Raises `EncoderMismatchError`, and `CorpusError` for a file that cannot be read here or is
    another one than where the order was given, for an engine that is not installed and for another
    version of this package; each names the machine.
    """
    try:
        return _encoded(order)
    except CorpusError as error:
        here = f" (on {socket.gethostname()})"
        problems = [replace(problem, rule=problem.rule + here) for problem in error.problems]
        raise CorpusError(*problems) from error


def _encoded(order: EncodeRequest) -> EncodeResult:
    _check(order)
    encoder = _encoder(order.engine)
    hashes = _Hashes()
    batches: list[tuple[Batch, Encoded]] = []
    end = UnitEnd(0, Counter())
    for item in chunks(
        order.source,
        [order.unit],
        order.selection,
        order.validation_fraction,
        hashes if order.hashed else None,
    ):
        if isinstance(item, UnitEnd):
            end = item
        else:
            textless = replace(item, chunk=replace(item.chunk, text=b""))
            batches.append((textless, encode_chunk(encoder, item.chunk)))
    return EncodeResult(batches, end, bytes(hashes.all))


def _check(order: EncodeRequest) -> None:
    if order.format != FORMAT_VERSION:
        rule = f"this worker makes format {FORMAT_VERSION} of shards and not {order.format}"
        remedy = "install the same version of overnight on every worker"
        raise CorpusError(Problem("data.cluster", "", rule, remedy))
    if order.engine == "gigatoken" and resolve_engine("auto") != "gigatoken":
        rule = "gigatoken is not installed"
        remedy = "pip install 'overnight[turbo]' on every worker, or set data.engine to tiktoken"
        raise CorpusError(Problem("data.engine", order.engine, rule, remedy))
    file = order.source.file
    with contextlib.suppress(OSError):  # told by whoever reads it
        if file.size_bytes() != order.size_bytes:
            rule = f"has {file.size_bytes():,} bytes and not {order.size_bytes:,}"
            remedy = "every worker must see the same files: use a shared folder or an address"
            raise CorpusError(Problem(file.name, "", rule, remedy))


_of_thread = threading.local()
"""An encoder for each: a worker may have several threads, and loading one takes half a second."""


def _encoder(engine: EngineName) -> Encoder:
    if getattr(_of_thread, "engine", None) != engine:
        _of_thread.encoder, _of_thread.engine = load_encoder(engine), engine
    encoder: Encoder = _of_thread.encoder
    return encoder


class _Hashes:
    """Takes every text for new, and keeps the hashes by which duplicates are told later."""

    def __init__(self) -> None:
        self.all = bytearray()

    def is_new(self, text: memoryview) -> bool:
        self.all += hash_text(text)
        return True


# --- where the shards are written ----------------------------------------------------------------


def delivered(
    pool: Pool[EncodeRequest, EncodeResult],
    job: DatasetBuild,
    tokens: int | None,
    seen: SeenTexts | None,
) -> Iterator[tuple[Item, Encoded | None]]:
    """What `items_of` gives, the chunks with their ids, from the workers of `pool`. Units that can
    be copied are not sent. `tokens` is what the data set holds before."""

    def order_of(unit: tuple[PlannedUnit, StoredUnit | None]) -> EncodeRequest | None:
        work, stored = unit
        return None if stored else _order(job, work)

    remember_kept(job, seen)
    for (work, stored), delivery in map_in_order(pool, planned(job, tokens), order_of):
        if stored:
            remember(job, work, seen)
            yield (work, stored), None
            continue
        assert delivery
        for item, encoded in _without_duplicates(delivery, seen) if seen else _all(delivery):
            yield (work, item), encoded


def _order(job: DatasetBuild, work: PlannedUnit) -> EncodeRequest:
    data, source = job.plan.data, work.source
    if not source.file.filesystem:
        source = replace(source, file=replace(source.file, folder=str(Path.cwd())))
    return EncodeRequest(
        source,
        work.source.file.size_bytes(),
        work.unit,
        job.plan.selection,
        data.validation_fraction,
        job.engine,
        data.drop_duplicates,
    )


Items = Iterator[tuple[Batch | UnitEnd, Encoded | None]]


def _all(delivery: EncodeResult) -> Items:
    yield from delivery.batches
    yield delivery.end, None


def _without_duplicates(delivery: EncodeResult, seen: SeenTexts) -> Items:
    """The documents that `seen` does not know yet; the others are counted as "duplicate"."""
    size = HASH_BYTES
    hashes = (delivery.hashes[i : i + size] for i in range(0, len(delivery.hashes), size))
    new = np.array([seen.is_new_hash(each) for each in hashes], dtype=bool)
    documents, rows = 0, 0
    skipped: Counter[str] = Counter()
    for batch, encoded in delivery.batches:
        starts = batch.chunk.starts
        parts = new[documents - 1 + np.cumsum(starts)]
        documents += int(np.count_nonzero(starts))
        rows += batch.rows
        skipped.update(batch.skipped)
        if duplicates := int(np.count_nonzero(starts & ~parts)):
            skipped["duplicate"] += duplicates
        if parts.any():
            kept = replace(
                batch,
                chunk=replace(
                    batch.chunk, lengths=batch.chunk.lengths[parts], starts=starts[parts]
                ),
                held_out=batch.held_out[parts],
                ends=batch.ends[parts],
                rows=rows,
                skipped=skipped,
            )
            ids = encoded.ids[np.repeat(parts, encoded.counts.astype(np.int64))]
            yield kept, Encoded(ids, encoded.counts[parts])
            rows, skipped = 0, Counter()
    skipped.update(delivery.end.skipped)
    yield UnitEnd(delivery.end.rows + rows, skipped), None
