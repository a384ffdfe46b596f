"""One attempt to build a dataset: its unfinished folder, the units to reuse, and the manifest.

The folder has a `.partial` name until the manifest is written. An interrupted attempt leaves its
finished units in it for the next one.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from filelock import FileLock, Timeout

from gpt.artifacts import DatasetManifest, Shard, SkippedFile, SourceFile, Split
from gpt.data.filters import SeenTexts, hash_text
from gpt.data.parquet import ParquetSource, read_rows
from gpt.data.shards import record_verified, write_manifest
from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.encoders import EngineName, resolve_engine
from gpt.data.tokenize.plan import FILTER_SETTINGS, DatasetPlan, PlannedUnit, plan_units
from gpt.data.tokenize.tokenizer import EncoderMismatchError
from gpt.data.tokenize.units import StoredUnit, UnitCounts, read_stored_units
from gpt.errors import DatasetError, Problem
from gpt.files import FULL_DISK, PARTIAL, sync, write_text

FALLBACK_NOTE = "fallback.txt"
"""In an unfinished folder: why the dataset is encoded by tiktoken and not by gigatoken."""
ABANDONED_SECONDS = 7 * 24 * 3600
"""An unfinished folder that was not touched for this long is deleted; until then it is resumed."""
LOCK_POLL_SECONDS = 0.5

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def dataset_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a dataset; wait for the process that holds it."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is building %s: waiting for it", folder)
        lock.acquire(poll_interval=LOCK_POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the `OSError` of a full disk into a `DatasetError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        rule = f"the disk is full: {error.strerror}; finished units are kept"
        remedy = "free some space (2 bytes per token), or set run.root to another disk; then run "
        remedy += "again"
        raise DatasetError(Problem(str(folder), "", rule, remedy)) from error


class DatasetBuild:
    """The unfinished folder of a dataset, its engine, and the finished units in it."""

    def __init__(
        self, plan: DatasetPlan, sources: list[ParquetSource], skipped_files: list[Problem]
    ) -> None:
        self.plan, self.sources, self.skipped_files = plan, sources, skipped_files
        self.folder = plan.folder.with_name(plan.folder.name + PARTIAL)
        self.folder.mkdir(exist_ok=True)
        note = self.folder / FALLBACK_NOTE
        self.notes = (note.read_text(encoding="utf-8"),) if note.is_file() else ()
        engine = "tiktoken" if self.notes else plan.data.engine
        self.engine: EngineName = resolve_engine(engine)
        self._trusted = {"tiktoken"} if engine == "tiktoken" else {"tiktoken", "gigatoken"}
        self.finished = self._find_finished()
        self.total_rows = sum(source.rows for source in sources)

    def _is_usable(self, stored: StoredUnit) -> bool:
        return stored.entry.complete and stored.entry.engine in self._trusted

    def _find_finished(self) -> list[tuple[PlannedUnit, StoredUnit]]:
        """The units that an interrupted run left in the folder, from the first without a gap."""
        finished = []
        for unit, stored in zip(self._units(), read_stored_units(self.folder), strict=False):
            is_same = stored.entry.key == unit.key
            if not (is_same and self._is_usable(stored) and stored.is_intact()):
                break
            finished.append((unit, stored))
        return finished

    def _units(self) -> Iterator[PlannedUnit]:
        return plan_units(self.plan, self.sources)

    @property
    def is_complete(self) -> bool:
        """Whether all units are finished."""
        return next(islice(self._units(), len(self.finished), None), None) is None

    def remaining_units(self) -> Iterator[tuple[PlannedUnit, StoredUnit | None]]:
        """Every unit that is not finished, in order, and where it can be copied from, if
        anywhere."""
        limit = self.plan.data.max_tokens
        known_tokens: int | None = sum(stored.entry.counts.tokens for _, stored in self.finished)
        stored_units = self._find_in_other_datasets()
        for unit in islice(self._units(), len(self.finished), None):
            stored = stored_units.get(unit.key)
            size = stored.entry.counts.tokens if stored else 0
            # Under max_tokens a unit is copied only where it is known to fit completely.
            fits = limit is None or (known_tokens is not None and known_tokens + size <= limit)
            if stored and not (fits and stored.is_intact()):
                stored = None
            known_tokens = known_tokens + size if stored and known_tokens is not None else None
            yield unit, stored

    def add_to_seen(self, unit: PlannedUnit, seen: SeenTexts | None) -> None:
        """Record the texts of a unit that is not encoded."""
        if seen:
            for rows in read_rows(unit.source, [unit.unit], self.plan.row_filter):
                for text in rows.texts:
                    seen.is_new(hash_text(text))

    def _find_in_other_datasets(self) -> dict[str, StoredUnit]:
        """The units of all other datasets by key, without checking that they are intact."""
        found: dict[str, StoredUnit] = {}
        for folder in sorted(self.folder.parent.iterdir()):
            if folder != self.folder and folder.is_dir():
                for stored in filter(self._is_usable, read_stored_units(folder)):
                    found.setdefault(stored.entry.key, stored)
        return found

    def restart_with_tiktoken(self, reason: EncoderMismatchError) -> None:
        """Delete what was built. This dataset never uses gigatoken again."""
        note = f"gigatoken was replaced by tiktoken for the whole dataset: {reason}"
        logger.warning(note)
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        write_text(self.folder / FALLBACK_NOTE, note)

    def publish(self, total: UnitCounts, shards: dict[str, tuple[Shard, ...]]) -> DatasetManifest:
        """Write the manifest and give the folder its final name."""
        plan, data = self.plan, self.plan.data
        splits = {
            name: Split(
                shards=shards[name],
                documents=counts.documents,
                tokens=counts.tokens,
                text_bytes=counts.text_bytes,
            )
            for name, counts in total.splits.items()
        }
        skipped = {"null": 0, "empty": 0} | dict(total.skipped)
        if data.max_tokens is not None:
            skipped["max_tokens"] = self.total_rows - total.documents - sum(skipped.values())
        manifest = DatasetManifest(
            fingerprint=plan.fingerprint,
            folder=self.folder,
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
                for source in self.sources
            ),
            train=splits["train"],
            validation=splits["validation"],
            skipped=skipped,
            skipped_files=tuple(
                SkippedFile(path=problem.key, reason=problem.rule) for problem in self.skipped_files
            ),
            settings={name: getattr(data, name) for name in ("tokens_per_shard", *FILTER_SETTINGS)},
            engine=self.engine,
            notes=self.notes,
            document_lengths=tuple(
                total.lengths[bits] for bits in range(max(total.lengths, default=-1) + 1)
            ),
        )
        (self.folder / FALLBACK_NOTE).unlink(missing_ok=True)
        return publish_dataset(self.folder, plan.folder, manifest)

    def remove_if_useless(self) -> None:
        """Delete the folder if the next attempt has nothing to reuse in it."""
        if not read_stored_units(self.folder) and not (self.folder / FALLBACK_NOTE).exists():
            shutil.rmtree(self.folder, ignore_errors=True)


def publish_dataset(partial: Path, folder: Path, manifest: DatasetManifest) -> DatasetManifest:
    """Turn the complete `partial` into `folder`: the manifest last, then the name. A damaged
    dataset of that name is replaced."""
    write_manifest(manifest.model_copy(update={"folder": partial}))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    sync(folder.parent)
    published = manifest.model_copy(update={"folder": folder})
    record_verified(published)
    return published


def remove_abandoned(folder: Path) -> None:
    """Delete unfinished folders, except that of the dataset `folder`, in which nothing happened for
    `ABANDONED_SECONDS`: every finished unit changes the time of the journal."""
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
