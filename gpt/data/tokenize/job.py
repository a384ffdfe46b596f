"""One attempt at a data set: its unfinished folder, and every unit there is to keep, copy or do."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from itertools import groupby

from gpt.artifacts import DatasetManifest, Shard, SkippedFile, SourceFile, Split
from gpt.data.filters import SeenTexts
from gpt.data.parquet import ParquetSource, read_rows
from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.chunks import Batch, UnitEnd, chunks
from gpt.data.tokenize.encoders import EncoderMismatchError, EngineName
from gpt.data.tokenize.plan import DatasetPlan, PlannedUnit, plan_units
from gpt.data.tokenize.pool import resolve_engine
from gpt.data.tokenize.units import SPLITS, StoredUnit, UnitCounts, read_stored_units
from gpt.errors import Problem
from gpt.files import PARTIAL, write_text

FALLBACK = "fallback.txt"
"""In an unfinished folder: why the faster engine was given up for this data set."""

logger = logging.getLogger(__name__)
Item = tuple[PlannedUnit, Batch | UnitEnd | StoredUnit]


class DatasetBuild:
    """One attempt at a data set: its unfinished folder, its engine, the units to do and to keep."""

    def __init__(
        self, plan: DatasetPlan, sources: list[ParquetSource], skipped: list[Problem]
    ) -> None:
        self.plan, self.sources, self.skipped = plan, sources, skipped
        self.folder = plan.folder.with_name(plan.folder.name + PARTIAL)
        self.folder.mkdir(exist_ok=True)
        note = self.folder / FALLBACK
        self.notes = (note.read_text(encoding="utf-8"),) if note.is_file() else ()
        asked = "tiktoken" if self.notes else plan.data.engine
        self.engine: EngineName = resolve_engine(asked)
        self._trusted = {"tiktoken"} if asked == "tiktoken" else {"tiktoken", "gigatoken"}
        self.works = plan_units(plan, sources)
        self.kept = self._kept()
        self.rows_total = sum(source.rows for source in sources)

    def _kept(self) -> list[StoredUnit]:
        """The units that lie in the unfinished folder already, from the first one on."""
        kept = []
        for work, stored in zip(self.works, read_stored_units(self.folder), strict=False):
            entry = stored.entry
            same = entry.key == work.key and entry.engine in self._trusted and entry.whole
            if not same or not stored.is_intact():
                break
            kept.append(stored)
        return kept

    def elsewhere(self) -> dict[str, StoredUnit]:
        """The units that lie in other data sets, by key; whether they are intact is not asked."""
        found: dict[str, StoredUnit] = {}
        for folder in sorted(self.folder.parent.iterdir()):
            if folder != self.folder and folder.is_dir():
                for stored in read_stored_units(folder):
                    if stored.entry.whole and stored.entry.engine in self._trusted:
                        found.setdefault(stored.entry.key, stored)
        return found

    def restart_with_tiktoken(self, reason: EncoderMismatchError) -> None:
        """Give up gigatoken, for this data set and whenever it is taken up again."""
        note = f"gigatoken was given up for tiktoken, from the beginning: {reason}"
        logger.warning(note)
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        write_text(self.folder / FALLBACK, note)


def planned(
    job: DatasetBuild, tokens: int | None
) -> Iterator[tuple[PlannedUnit, StoredUnit | None]]:
    """Every unit that is not kept, in order, with what there is to copy of it in other data sets.
    `tokens` is what the data set holds before."""
    most = job.plan.data.max_tokens
    elsewhere = job.elsewhere()
    for work in job.works[len(job.kept) :]:
        stored = elsewhere.get(work.key)
        size = stored.entry.tally.tokens if stored else 0
        # Under max_tokens a unit is copied only where it is known to fit as a whole.
        fits = most is None or (tokens is not None and tokens + size <= most)
        if stored and fits and stored.is_intact():
            tokens = None if tokens is None else tokens + size
            yield work, stored
        else:
            tokens = None
            yield work, None


def items_of(job: DatasetBuild, tokens: int | None, seen: SeenTexts | None) -> Iterator[Item]:
    """What there is to do in order: units to copy from other data sets, and the chunks and ends of
    those to encode. `tokens` is what the data set holds before."""
    remember_kept(job, seen)
    for (_, copied), units in groupby(
        planned(job, tokens), key=lambda unit: (id(unit[0].source), unit[1] is not None)
    ):
        if not copied:
            yield from _chunks_of(job, [work for work, _ in units], seen)
            continue
        for work, stored in units:
            assert stored
            remember(job, work, seen)
            yield work, stored


def _chunks_of(
    job: DatasetBuild, works: list[PlannedUnit], seen: SeenTexts | None
) -> Iterator[Item]:
    of_run = iter(works)
    work = next(of_run)
    units = [each.unit for each in works]
    data, selection = job.plan.data, job.plan.selection
    for item in chunks(work.source, units, selection, data.validation_fraction, seen):
        yield work, item
        if isinstance(item, UnitEnd):
            work = next(of_run, work)


def remember_kept(job: DatasetBuild, seen: SeenTexts | None) -> None:
    """`remember` for all units that are kept."""
    for work in job.works[: len(job.kept)]:
        remember(job, work, seen)


def remember(job: DatasetBuild, work: PlannedUnit, seen: SeenTexts | None) -> None:
    """Let `seen` know the texts of a unit that is not encoded."""
    if seen:
        for rows in read_rows(work.source, [work.unit], job.plan.selection):
            for text in rows.texts:
                seen.is_new(text)


def build_manifest(
    job: DatasetBuild, total: UnitCounts, shards: dict[str, tuple[Shard, ...]]
) -> DatasetManifest:
    plan, data = job.plan, job.plan.data
    splits = {
        name: Split(
            shards=shards[name],
            documents=total.sides[name].documents,
            tokens=total.sides[name].tokens,
            text_bytes=total.sides[name].text_bytes,
        )
        for name in SPLITS
    }
    skipped = {"null": 0, "empty": 0} | dict(total.skipped)
    if data.max_tokens is not None:
        skipped["max_tokens"] = job.rows_total - total.documents - sum(skipped.values())
    return DatasetManifest(
        fingerprint=plan.fingerprint,
        folder=job.folder,
        tokenizer=tokenizer.TOKENIZER_NAME,
        ranks_sha256=tokenizer.RANKS_SHA256,
        text_column=data.text_column,
        validation_fraction=data.validation_fraction,
        sources=tuple(
            SourceFile(
                path=source.file.name,
                size_bytes=source.file.size_bytes(),
                sha256=plan.identities.by_file[source.file].sha256,
                rows=source.rows,
            )
            for source in job.sources
        ),
        train=splits["train"],
        validation=splits["validation"],
        skipped=skipped,
        skipped_files=tuple(
            SkippedFile(path=problem.key, reason=problem.rule) for problem in job.skipped
        ),
        settings={
            "tokens_per_shard": data.tokens_per_shard,
            "where": data.where,
            "min_length": data.min_length,
            "max_length": data.max_length,
            "drop_duplicates": data.drop_duplicates,
            "max_tokens": data.max_tokens,
        },
        engine=job.engine,
        notes=job.notes,
        document_lengths=tuple(
            total.lengths[bits] for bits in range(max(total.lengths, default=-1) + 1)
        ),
    )
