"""What a config comes to before any row is read: files, their identity, the data set's name, units.

The name is a hash of all that decides the tokens; so is the key of every unit of work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from gpt.artifacts import DatasetManifest
from gpt.config import DataSection, RunConfig, fingerprint
from gpt.data import tokenizer
from gpt.data.parquet import Source, check_whole, inspect
from gpt.data.selection import Selection, numbered_partitions, partition_values
from gpt.data.shards import MANIFEST, check, read_manifest
from gpt.data.sources import HASHES, Identities, find_sources
from gpt.data.units import Unit
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
    data = config.data
    files = find_sources(data.source)
    datasets = config.run.root / "datasets"
    identities = Identities(files, datasets / HASHES)
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


def works_of(plan: Plan, sources: list[Source]) -> list[Work]:
    """Every unit in order. With drop_duplicates a unit depends on all before it, so its key holds
    theirs; otherwise on its own rows alone."""
    data = plan.data
    settings = fingerprint(
        {
            "format": FORMAT_VERSION,
            "ranks": tokenizer.RANKS_SHA256,
            "text_column": data.text_column,
            "validation_fraction": data.validation_fraction,
            "selection": {k: v for k, v in asked_for(data).items() if k != "max_tokens"},
        }
    )
    works: list[Work] = []
    before = ""
    for source in sources:
        identity = plan.identities.of[source.file].sha256
        partitions = partition_values(source.file, plan.selection) if data.where else {}
        for unit in source.units:
            rows = [unit.rows.start, unit.rows.stop]
            values = {"settings": settings, "file": identity, "rows": rows, "before": before}
            key = fingerprint(values | {"partitions": partitions})[:32]
            works.append(Work(source, unit, key))
            before = key if data.drop_duplicates else ""
    return works
