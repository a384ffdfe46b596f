"""What a config amounts to before any row is read: files, dataset fingerprint and units.

The dataset's name is a hash of everything that decides its tokens, and so is the key of each unit.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.artifacts import DatasetManifest
from gpt.config.schema import DataSection, RunConfig, fingerprint
from gpt.data.filters import RowFilter, collect_partition_values, find_integer_partitions
from gpt.data.parquet import ParquetSource
from gpt.data.shards import MANIFEST, read_manifest, verify_if_changed
from gpt.data.sources import HASHES, CorpusFile, FileIdentities, find_sources
from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.units import Unit, split_into_units
from gpt.errors import DatasetError

FORMAT_VERSION = 2
"""Raised when the same sources and settings would give different shards."""

FILTER_SETTINGS = ("where", "min_length", "max_length", "drop_duplicates", "max_tokens")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetPlan:
    """What is known before a file is opened."""

    data: DataSection
    row_filter: RowFilter
    identities: FileIdentities
    fingerprint: str
    folder: Path

    def find_existing(self) -> DatasetManifest | None:
        """The complete dataset in `folder`; None if there is none or it is damaged."""
        if not (self.folder / MANIFEST).is_file():
            return None
        try:
            found = read_manifest(self.folder)
            verify_if_changed(found)
        except DatasetError as error:
            logger.warning("%s\nIt is rebuilt; its intact units are reused.", error)
            return None
        return None if found.skipped_files and self.data.on_bad_file == "fail" else found


def make_plan(config: RunConfig) -> DatasetPlan:
    """Find the source files and hash those that changed. Raises `CorpusError`."""
    files = find_sources(config.data.source)
    identities = FileIdentities(files, config.run.root / "datasets" / HASHES)
    return plan_for_files(config, files, identities)


def plan_for_files(
    config: RunConfig, files: Sequence[CorpusFile], identities: FileIdentities
) -> DatasetPlan:
    data = config.data
    row_filter = RowFilter(
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
            collect_partition_values(file, row_filter) for file in identities.by_file
        ]
    name = fingerprint(values)
    return DatasetPlan(data, row_filter, identities, name, config.run.root / "datasets" / name[:16])


def non_default_settings(data: DataSection) -> dict[str, str | int | bool]:
    """The settings that were added later and decide tokens, where they are not the default: so
    datasets made before a setting existed keep their name."""
    return {name: getattr(data, name) for name in FILTER_SETTINGS if getattr(data, name)}


@dataclass(frozen=True)
class PlannedUnit:
    """One unit of one source, and the key under which its ids are stored."""

    source: ParquetSource
    unit: Unit
    key: str


def plan_units(plan: DatasetPlan, sources: Sequence[ParquetSource]) -> Iterator[PlannedUnit]:
    """All units in order, made one at a time: 15 trillion tokens are millions of units, and a list
    of them would take gigabytes.

    With drop_duplicates a unit depends on all units before it, so its key includes theirs.
    Otherwise it depends on its own rows alone.
    """
    settings, before = _unit_settings(plan.data), ""
    for source in sources:
        sha256 = plan.identities.by_file[source.file].sha256
        partitions = (
            collect_partition_values(source.file, plan.row_filter) if plan.data.where else {}
        )
        # The text that `fingerprint` would hash, keys in order, written out: five times as fast.
        head = f'", "file": "{sha256}", "partitions": {json.dumps(partitions, sort_keys=True)}'
        for unit in split_into_units(source.groups.tolist()):
            rows = f'"rows": [{unit.rows.start}, {unit.rows.stop}], "settings": "{settings}"'
            text = f'{{"before": "{before}{head}, {rows}}}'
            key = hashlib.sha256(text.encode()).hexdigest()[:32]
            yield PlannedUnit(source, unit, key)
            before = key if plan.data.drop_duplicates else ""


def _unit_settings(data: DataSection) -> str:
    """A hash of the settings that decide the ids of a unit."""
    settings = non_default_settings(data)
    return fingerprint(
        {
            "format": FORMAT_VERSION,
            "ranks": tokenizer.RANKS_SHA256,
            "text_column": data.text_column,
            "validation_fraction": data.validation_fraction,
            "selection": {name: value for name, value in settings.items() if name != "max_tokens"},
        }
    )
