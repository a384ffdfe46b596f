"""What a config comes to before any row is read: files, their identity, the data set's name, units.

The name is a hash of all that decides the tokens; so is the key of every unit of work.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from bisect import bisect_right
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from gpt.artifacts import DatasetManifest
from gpt.config.schema import DataSection, RunConfig, fingerprint
from gpt.data.filters import RowFilter, collect_partition_values, find_integer_partitions
from gpt.data.parquet import ParquetSource, check_all_rows, inspect
from gpt.data.shards import MANIFEST, read_manifest, verify_if_changed
from gpt.data.sources import HASHES, CorpusFile, FileIdentities, find_sources
from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.units import Unit, split_into_units
from gpt.errors import CorpusError, DatasetError, Problem

FORMAT_VERSION = 2
"""Raised when the same sources and settings would give other shards."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetPlan:
    """All that is known before any file was opened."""

    data: DataSection
    selection: RowFilter
    identities: FileIdentities
    fingerprint: str
    folder: Path

    def find_existing(self) -> DatasetManifest | None:
        if not (self.folder / MANIFEST).is_file():
            return None
        try:
            found = read_manifest(self.folder)
            verify_if_changed(found)
        except DatasetError as error:
            logger.warning("%s\nIt is made anew; what is whole of it is kept.", error)
            return None
        if found.skipped_files and self.data.on_bad_file == "fail":
            return None
        self.identities.save()
        return found


def make_plan(config: RunConfig) -> DatasetPlan:
    files = find_sources(config.data.source)
    return plan_for_files(
        config, files, FileIdentities(files, config.run.root / "datasets" / HASHES)
    )


def plan_for_files(
    config: RunConfig, files: Sequence[CorpusFile], identities: FileIdentities
) -> DatasetPlan:
    """The plan for files whose identities are known."""
    data = config.data
    datasets = config.run.root / "datasets"
    selection = RowFilter(
        data.text_column,
        data.where,
        data.min_length,
        data.max_length,
        find_integer_partitions(files) if data.where else frozenset(),
    )
    values = {
        "format": FORMAT_VERSION,
        "sources": [identity.sha256 for identity in identities.by_file.values()],
        "ranks": tokenizer.RANKS_SHA256,
        "text_column": data.text_column,
        "validation_fraction": data.validation_fraction,
        "tokens_per_shard": data.tokens_per_shard,
    } | non_default_settings(data)
    if identities.problems:
        values["unreadable"] = [problem.key for problem in identities.problems]
    if data.where:
        values["partitions"] = [
            collect_partition_values(file, selection) for file in identities.by_file
        ]
    name = fingerprint(values)
    return DatasetPlan(data, selection, identities, name, datasets / name[:16])


def non_default_settings(data: DataSection) -> dict[str, str | int | bool]:
    """The settings beyond the first ones that decide tokens, where they are not left at default:
    data sets made before there was such a setting keep their name."""
    names = ("where", "min_length", "max_length", "drop_duplicates", "max_tokens")
    return {name: getattr(data, name) for name in names if getattr(data, name)}


def inspect_sources(
    plan: DatasetPlan,
) -> Generator[float, None, tuple[list[ParquetSource], list[Problem]]]:
    """The files that can be used, and what is wrong with those that on_bad_file lets be skipped.

    Yields the seconds since it began after each file that is read for that: skipping is decided
    before tokenising, by reading every file whole. Raises `CorpusError` with all that is wrong.
    """
    started = time.monotonic()
    sources: list[ParquetSource] = []
    problems = list(plan.identities.problems)
    skipping = plan.data.on_bad_file == "skip"
    plan.selection.check_condition()
    for file in plan.identities.by_file:
        try:
            source = inspect(file, plan.selection)
            if skipping:
                check_all_rows(source, plan.selection)
                yield time.monotonic() - started
            sources.append(source)
        except CorpusError as error:
            problems += error.problems
    if problems and (not skipping or not sources):
        raise CorpusError(*problems)
    for problem in problems:
        logger.warning("left out: %s", problem)
    return sources, problems


@dataclass(frozen=True)
class PlannedUnit:
    """One unit of one source, and the name under which its ids are known."""

    source: ParquetSource
    unit: Unit
    key: str


def plan_units(plan: DatasetPlan, sources: Sequence[ParquetSource]) -> Works:
    """Every unit in order."""
    return Works(plan, sources)


class Works(Sequence[PlannedUnit]):
    """The units of a plan, each made when it is asked for: 15T tokens are millions of them, and
    held all at once they would take gigabytes.

    With drop_duplicates a unit depends on all before it, so its key holds theirs, and getting at
    one takes the time of all before it; otherwise on its own rows alone.
    """

    def __init__(
        self, plan: DatasetPlan, sources: Sequence[ParquetSource], window: range | None = None
    ) -> None:
        self._plan, self._sources = plan, sources
        self._ends: list[int] = []
        if window is None:
            counts = (sum(1 for _ in _units(source)) for source in sources)
            self._ends = list(itertools.accumulate(counts))
            window = range(self._ends[-1] if self._ends else 0)
        self._window = window

    def __len__(self) -> int:
        return len(self._window)

    @overload
    def __getitem__(self, index: int) -> PlannedUnit: ...

    @overload
    def __getitem__(self, index: slice) -> Works: ...

    def __getitem__(self, index: int | slice) -> PlannedUnit | Works:
        if isinstance(index, int):
            return next(self._from(self._window[index]))
        window = self._window[index]
        assert window.step == 1, "units are taken in order"
        part = Works(self._plan, self._sources, window)
        part._ends = self._ends
        return part

    def __iter__(self) -> Iterator[PlannedUnit]:
        return itertools.islice(self._from(self._window.start), len(self))

    def _from(self, first: int) -> Iterator[PlannedUnit]:
        """Units `first` and on."""
        if self._plan.data.drop_duplicates:
            return itertools.islice(self._made(0), first, None)
        file = bisect_right(self._ends, first)
        before = self._ends[file - 1] if file else 0
        return itertools.islice(self._made(file), first - before, None)

    def _made(self, first_file: int) -> Iterator[PlannedUnit]:
        """Units from a file on, the first of all where keys hold those before."""
        plan, settings = self._plan, _unit_settings(self._plan.data)
        chained, before = plan.data.drop_duplicates, ""
        for source in itertools.islice(self._sources, first_file, None):
            identity = plan.identities.by_file[source.file].sha256
            partitions = (
                collect_partition_values(source.file, plan.selection) if plan.data.where else {}
            )
            # What `fingerprint` hashes, its keys in order, written out: five times as fast.
            head = (
                f'", "file": "{identity}", "partitions": {json.dumps(partitions, sort_keys=True)}'
            )
            for unit in _units(source):
                rows = f'"rows": [{unit.rows.start}, {unit.rows.stop}], "settings": "{settings}"'
                text = f'{{"before": "{before}{head}, {rows}}}'
                key = hashlib.sha256(text.encode()).hexdigest()[:32]
                yield PlannedUnit(source, unit, key)
                before = key if chained else ""


def _units(source: ParquetSource) -> Iterator[Unit]:
    return split_into_units(source.groups.tolist())


def _unit_settings(data: DataSection) -> str:
    """What of the settings decides a unit's ids."""
    return fingerprint(
        {
            "format": FORMAT_VERSION,
            "ranks": tokenizer.RANKS_SHA256,
            "text_column": data.text_column,
            "validation_fraction": data.validation_fraction,
            "selection": {k: v for k, v in non_default_settings(data).items() if k != "max_tokens"},
        }
    )
