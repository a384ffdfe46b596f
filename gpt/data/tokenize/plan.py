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
from gpt.data.filters import Selection, numbered_partitions, partition_values
from gpt.data.parquet import Source, check_whole, inspect
from gpt.data.shards import MANIFEST, check, read_manifest
from gpt.data.sources import HASHES, CorpusFile, Identities, find_sources
from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.units import Unit, cut_into_units
from gpt.errors import CorpusError, DatasetError, Problem

FORMAT_VERSION = 2
"""Raised when the same sources and settings would give other shards."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """All that is known before any file was opened."""

    data: DataSection
    selection: Selection
    identities: Identities
    fingerprint: str
    folder: Path

    def existing(self) -> DatasetManifest | None:
        if not (self.folder / MANIFEST).is_file():
            return None
        try:
            found = read_manifest(self.folder)
            check(found)
        except DatasetError as error:
            logger.warning("%s\nIt is made anew; what is whole of it is kept.", error)
            return None
        if found.skipped_files and self.data.on_bad_file == "fail":
            return None
        self.identities.save()
        return found


def make_plan(config: RunConfig) -> Plan:
    files = find_sources(config.data.source)
    return plan_of(config, files, Identities(files, config.run.root / "datasets" / HASHES))


def plan_of(config: RunConfig, files: Sequence[CorpusFile], identities: Identities) -> Plan:
    """The plan for files whose identities are known."""
    data = config.data
    datasets = config.run.root / "datasets"
    selection = Selection(
        data.text_column,
        data.where,
        data.min_length,
        data.max_length,
        numbered_partitions(files) if data.where else frozenset(),
    )
    values = {
        "format": FORMAT_VERSION,
        "sources": [identity.sha256 for identity in identities.of.values()],
        "ranks": tokenizer.RANKS_SHA256,
        "text_column": data.text_column,
        "validation_fraction": data.validation_fraction,
        "tokens_per_shard": data.tokens_per_shard,
    } | asked_for(data)
    if identities.problems:
        values["unreadable"] = [problem.key for problem in identities.problems]
    if data.where:
        values["partitions"] = [partition_values(file, selection) for file in identities.of]
    name = fingerprint(values)
    return Plan(data, selection, identities, name, datasets / name[:16])


def asked_for(data: DataSection) -> dict[str, str | int | bool]:
    """The settings beyond the first ones that decide tokens, where they are not left at default:
    data sets made before there was such a setting keep their name."""
    names = ("where", "min_length", "max_length", "drop_duplicates", "max_tokens")
    return {name: getattr(data, name) for name in names if getattr(data, name)}


def usable(plan: Plan) -> Generator[float, None, tuple[list[Source], list[Problem]]]:
    """The files that can be used, and what is wrong with those that on_bad_file lets be skipped.

    Yields the seconds since it began after each file that is read for that: skipping is decided
    before tokenising, by reading every file whole. Raises `CorpusError` with all that is wrong.
    """
    started = time.monotonic()
    sources: list[Source] = []
    problems = list(plan.identities.problems)
    skipping = plan.data.on_bad_file == "skip"
    plan.selection.check_condition()
    for file in plan.identities.of:
        try:
            source = inspect(file, plan.selection)
            if skipping:
                check_whole(source, plan.selection)
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
class Work:
    """One unit of one source, and the name under which its ids are known."""

    source: Source
    unit: Unit
    key: str


def works_of(plan: Plan, sources: Sequence[Source]) -> Works:
    """Every unit in order."""
    return Works(plan, sources)


class Works(Sequence[Work]):
    """The units of a plan, each made when it is asked for: 15T tokens are millions of them, and
    held all at once they would take gigabytes.

    With drop_duplicates a unit depends on all before it, so its key holds theirs, and getting at
    one takes the time of all before it; otherwise on its own rows alone.
    """

    def __init__(self, plan: Plan, sources: Sequence[Source], window: range | None = None) -> None:
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
    def __getitem__(self, index: int) -> Work: ...

    @overload
    def __getitem__(self, index: slice) -> Works: ...

    def __getitem__(self, index: int | slice) -> Work | Works:
        if isinstance(index, int):
            return next(self._from(self._window[index]))
        window = self._window[index]
        assert window.step == 1, "units are taken in order"
        part = Works(self._plan, self._sources, window)
        part._ends = self._ends
        return part

    def __iter__(self) -> Iterator[Work]:
        return itertools.islice(self._from(self._window.start), len(self))

    def _from(self, first: int) -> Iterator[Work]:
        """Units `first` and on."""
        if self._plan.data.drop_duplicates:
            return itertools.islice(self._made(0), first, None)
        file = bisect_right(self._ends, first)
        before = self._ends[file - 1] if file else 0
        return itertools.islice(self._made(file), first - before, None)

    def _made(self, first_file: int) -> Iterator[Work]:
        """Units from a file on, the first of all where keys hold those before."""
        plan, settings = self._plan, _unit_settings(self._plan.data)
        chained, before = plan.data.drop_duplicates, ""
        for source in itertools.islice(self._sources, first_file, None):
            identity = plan.identities.of[source.file].sha256
            partitions = partition_values(source.file, plan.selection) if plan.data.where else {}
            # What `fingerprint` hashes, its keys in order, written out: five times as fast.
            head = (
                f'", "file": "{identity}", "partitions": {json.dumps(partitions, sort_keys=True)}'
            )
            for unit in _units(source):
                rows = f'"rows": [{unit.rows.start}, {unit.rows.stop}], "settings": "{settings}"'
                text = f'{{"before": "{before}{head}, {rows}}}'
                key = hashlib.sha256(text.encode()).hexdigest()[:32]
                yield Work(source, unit, key)
                before = key if chained else ""


def _units(source: Source) -> Iterator[Unit]:
    return cut_into_units(source.groups.tolist())


def _unit_settings(data: DataSection) -> str:
    """What of the settings decides a unit's ids."""
    return fingerprint(
        {
            "format": FORMAT_VERSION,
            "ranks": tokenizer.RANKS_SHA256,
            "text_column": data.text_column,
            "validation_fraction": data.validation_fraction,
            "selection": {k: v for k, v in asked_for(data).items() if k != "max_tokens"},
        }
    )
