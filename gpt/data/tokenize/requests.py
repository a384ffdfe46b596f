"""A unit as a request that another machine can encode, and what it returns.

A request is small: which rows of which file, and how. The worker reads them itself, so it must
reach the files under the names in data.source. A result holds the ids of one unit (8 MB for 16 MB
of text) in the same chunks that this machine would have made, so the writer makes the same shards
of them. Nothing here depends on the kind of cluster.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gpt.data.filters import HASH_BYTES, RowFilter, SeenTexts
from gpt.data.parquet import ParquetSource
from gpt.data.tokenize.build import DatasetBuild
from gpt.data.tokenize.chunks import read_chunks
from gpt.data.tokenize.encoders import EncodedChunk, EngineName, encode_chunk, resolve_engine
from gpt.data.tokenize.plan import FORMAT_VERSION, PlannedUnit
from gpt.data.tokenize.pool import Pool, map_in_order
from gpt.data.tokenize.units import StoredUnit, Unit
from gpt.errors import CorpusError, Problem


@dataclass(frozen=True)
class EncodeRequest:
    """Everything that decides the ids of a unit."""

    source: ParquetSource
    size_bytes: int
    """Size of the file where the request was made."""
    unit: Unit
    row_filter: RowFilter
    validation_fraction: float
    engine: EngineName
    with_hashes: bool
    """Return a hash per document, to find duplicates across all units."""
    format: int = FORMAT_VERSION


@dataclass(frozen=True, eq=False)
class EncodeResult:
    """The encoded chunks of a unit."""

    chunks: list[EncodedChunk]
    hashes: bytes
    """`HASH_BYTES` per document in order, if they were requested."""


OpenCluster = Callable[[], contextlib.AbstractContextManager[Pool[EncodeRequest, EncodeResult]]]
"""Opens the workers of a cluster for as long as they are needed."""


def encode_unit(request: EncodeRequest) -> EncodeResult:
    """Read and encode the rows of a request; runs on a worker.

    Raises `EncoderMismatchError`, and `CorpusError` for a file that cannot be read here or differs
    from the one where the request was made, for an engine that is not installed, and for another
    version of this package. Each message names the machine.
    """
    try:
        _check_worker(request)
        hashes = bytearray()

        def collect_hash(digest: bytes) -> bool:
            hashes.extend(digest)
            return True

        chunks = read_chunks(
            request.source,
            [request.unit],
            request.row_filter,
            request.validation_fraction,
            collect_hash if request.with_hashes else None,
        )
        encoded = [encode_chunk(request.engine, chunk) for _, chunk in chunks]
        return EncodeResult(encoded, bytes(hashes))
    except CorpusError as error:
        host = f" (on {socket.gethostname()})"
        problems = [replace(problem, rule=problem.rule + host) for problem in error.problems]
        raise CorpusError(*problems) from error


def _check_worker(request: EncodeRequest) -> None:
    if request.format != FORMAT_VERSION:
        rule = f"this worker writes shard format {FORMAT_VERSION}, not {request.format}"
        remedy = "install the same version of overnight on every worker"
        raise CorpusError(Problem("data.cluster", "", rule, remedy))
    resolve_engine(request.engine)
    file = request.source.file
    with contextlib.suppress(OSError):  # reported when the file is read
        if file.size_bytes() != request.size_bytes:
            rule = f"has {file.size_bytes():,} bytes instead of {request.size_bytes:,}"
            remedy = "every worker must see the same files: use a shared folder or an address"
            raise CorpusError(Problem(file.name, "", rule, remedy))


def encode_on_cluster(
    cluster: Pool[EncodeRequest, EncodeResult],
    build: DatasetBuild,
    seen: SeenTexts | None,
) -> Iterator[tuple[PlannedUnit, EncodedChunk | StoredUnit]]:
    """Every unit that is not finished, in order: its encoded chunks, or where to copy it from.
    Units that can be copied are not sent."""
    items = (
        ((unit, stored), None if stored else _make_request(build, unit))
        for unit, stored in build.remaining_units()
    )
    for (unit, stored), result in map_in_order(cluster, items):
        if stored:
            build.add_to_seen(unit, seen)
            yield unit, stored
            continue
        assert result
        for chunk in _drop_duplicates(result, seen) if seen else result.chunks:
            yield unit, chunk


def _make_request(build: DatasetBuild, unit: PlannedUnit) -> EncodeRequest:
    data, source = build.plan.data, unit.source
    if not source.file.filesystem:
        source = replace(source, file=replace(source.file, folder=str(Path.cwd())))
    return EncodeRequest(
        source,
        unit.source.file.size_bytes(),
        unit.unit,
        build.plan.row_filter,
        data.validation_fraction,
        build.engine,
        data.drop_duplicates,
    )


def _drop_duplicates(result: EncodeResult, seen: SeenTexts) -> Iterator[EncodedChunk]:
    """Remove the documents that `seen` knows already, counting them as "duplicate"."""
    starts = range(0, len(result.hashes), HASH_BYTES)
    hashes = (result.hashes[start : start + HASH_BYTES] for start in starts)
    is_new = np.array([seen.is_new(each) for each in hashes], dtype=bool)
    documents = 0
    for chunk in result.chunks:
        parts = chunk.parts
        chosen = is_new[documents - 1 + np.cumsum(parts["starts"])]
        documents += int(np.count_nonzero(parts["starts"]))
        skipped = chunk.skipped.copy()
        if duplicates := int(np.count_nonzero(parts["starts"] & ~chosen)):
            skipped["duplicate"] += duplicates
        ids = chunk.ids[np.repeat(chosen, parts["tokens"])]
        yield replace(chunk, ids=ids, parts=parts[chosen], skipped=skipped)
