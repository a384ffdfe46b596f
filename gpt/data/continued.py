"""Data sets cut out of a whole one, for a model that knows a part of its files already: the text to
go on with, and the validation text that is new.

Training on new text alone makes a network forget the old. A share of old text among the new, with
the learning rate raised and lowered anew, ends where training from scratch on all would, in one
language and into another: Ibrahim et al. 2024 ("Simple and Scalable Strategies to Continually
Pre-train Large Language Models", arXiv:2403.08763). How large a share is a choice of ours, which
nobody has measured here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from gpt.artifacts import DatasetManifest, Shard, SourceFile, Split
from gpt.config.schema import fingerprint
from gpt.data.shards import (
    MANIFEST,
    REMEDY,
    ShardWriter,
    read_manifest,
    record_verified,
    verify_if_changed,
    write_manifest,
)
from gpt.data.tokenize.tokenizer import END_OF_TEXT, load_tokenizer
from gpt.data.tokenize.units import UNIT_JOURNAL, SplitCounts, StoredUnit, read_stored_units
from gpt.errors import DatasetError, Problem
from gpt.files import PARTIAL, atomic_folder

DERIVED_DATASETS = "derived"
"""The folder, beside `datasets`, of data sets that are cut out of others: none is what its sources
make."""
REPLAY_FRACTION = 0.05
TOKENS_PER_SHARD = 100_000_000
"""Where a manifest of long ago does not say."""
FORMAT_VERSION = 1
"""Raised when the same values would give other shards."""

Ids = Iterator[NDArray[np.uint16]]


def continuation(
    dataset: DatasetManifest, known: Collection[str], least_tokens: int, parent: Path
) -> DatasetManifest:
    """Of `dataset`, the training documents of the files that are not among the SHA-256 `known`, and
    of the others as many, evenly spread, as make up `REPLAY_FRACTION` of all its tokens, or
    `least_tokens`; and its validation side as it is, so that it is evaluated on the same slice.
    Where nothing is known, `dataset` itself.

    Content-addressed below `parent`, made once. Raises `DatasetError` where there is no new
    training text, or where the journal of `dataset` is not whole.
    """
    new, old = _new_and_old(dataset, known)
    tokens, tokens_known = (_summed(units, "train").tokens for units in (new, old))
    if not tokens:
        rule = "the new files have no document for training"
        raise DatasetError(Problem(str(dataset.folder), "", rule, "wait for more text"))
    if not old:
        return dataset
    wanted = max(tokens * REPLAY_FRACTION / (1 - REPLAY_FRACTION), least_tokens - tokens)
    share = min(1.0, wanted / tokens_known) if tokens_known else 0.0

    def write(name: str, folder: Path) -> DatasetManifest:
        replayed, phase = _Counted(), np.random.default_rng(int(name[:16], 16)).random()

        def ids() -> Ids:
            for unit in new:
                yield from unit.ids("train")
            yield from replayed.counting(_drawn(old, share, phase))

        shards = _write_split(dataset, folder, "train", ids())
        for shard in dataset.validation.shards:
            shutil.copyfile(dataset.folder / shard.name, folder / shard.name)
        note = (
            f"to go on from an earlier model: {tokens:,} training tokens that are new to it and "
            f"{replayed.tokens:,} of the {tokens_known:,} that it knows, of data set "
            f"{dataset.fingerprint[:16]}, whose validation side it has"
        )
        total = _summed(new, "train")
        total.add(replayed)
        return dataset.model_copy(
            update={"train": _split(shards, total), "notes": (*dataset.notes, note)}
        )

    asked = {"replay_fraction": REPLAY_FRACTION, "least_tokens": least_tokens}
    return _made(dataset, known, {"what": "continuation", **asked}, parent, write)


def build_new_validation_set(
    dataset: DatasetManifest, known: Collection[str], parent: Path
) -> DatasetManifest | None:
    """Of `dataset`, the validation documents of the files that are not among the SHA-256 `known`,
    and no training side. None where there are none, or where nothing is known.

    Content-addressed below `parent`, made once. Raises `DatasetError` where the journal of
    `dataset` is not whole.
    """
    new, old = _new_and_old(dataset, known)
    total = _summed(new, "validation")
    if not (total.tokens and old):
        return None

    def write(_: str, folder: Path) -> DatasetManifest:
        ids = (ids for unit in new for ids in unit.ids("validation"))
        shards = _write_split(dataset, folder, "validation", ids)
        note = f"the validation text of data set {dataset.fingerprint[:16]} that is new to a model"
        return dataset.model_copy(
            update={
                "train": Split(shards=(), documents=0, tokens=0, text_bytes=0),
                "validation": _split(shards, total),
                "notes": (*dataset.notes, note),
            }
        )

    return _made(dataset, known, {"what": "new validation text"}, parent, write)


def group_units_by_file(dataset: DatasetManifest) -> list[tuple[SourceFile, list[StoredUnit]]]:
    """Each source with its units, in order; with data.max_tokens the last may have fewer, or none.
    Raises `DatasetError` where the journal does not account for every token."""
    stored = read_stored_units(dataset.folder)
    if _summed(stored, "train").tokens != dataset.train.tokens:
        rule = "does not account for the tokens of the manifest"
        raise DatasetError(Problem(str(dataset.folder / UNIT_JOURNAL), "", rule, REMEDY))
    units = iter(stored)
    found = []
    for source in dataset.sources:
        mine: list[StoredUnit] = []
        rows = 0
        while rows < source.rows and (unit := next(units, None)):
            mine.append(unit)
            rows += unit.entry.counts.rows
        found.append((source, mine))
    return found


# --- cutting out ---------------------------------------------------------------------------------


def _new_and_old(
    dataset: DatasetManifest, known: Collection[str]
) -> tuple[list[StoredUnit], list[StoredUnit]]:
    by_file = group_units_by_file(dataset)
    new = [unit for file, units in by_file if file.sha256 not in known for unit in units]
    return new, [unit for file, units in by_file if file.sha256 in known for unit in units]


def _summed(units: Iterable[StoredUnit], split: str) -> SplitCounts:
    total = SplitCounts()
    for unit in units:
        total.add(unit.entry.counts.splits[split])
    return total


def _made(
    dataset: DatasetManifest,
    known: Collection[str],
    asked: dict[str, Any],
    parent: Path,
    write: Callable[[str, Path], DatasetManifest],
) -> DatasetManifest:
    """The data set that `write` makes, given its fingerprint and its folder, or has made before."""
    values = {
        "format": FORMAT_VERSION,
        "dataset": dataset.fingerprint,
        "known": sorted(file.sha256 for file in dataset.sources if file.sha256 in known),
    }
    name = fingerprint(values | asked)
    folder = parent / name[:16]
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f".{folder.name}.lock"):
        if not (folder / MANIFEST).is_file():
            for leftover in parent.glob(f".{folder.name}.*{PARTIAL}"):  # of a killed process
                shutil.rmtree(leftover)
            with atomic_folder(folder) as partial:
                made = write(name, partial).model_copy(
                    update={
                        "fingerprint": name,
                        "folder": partial,
                        "document_lengths": (),  # those of a part are not counted
                    }
                )
                write_manifest(made)
                record_verified(made)
    found = read_manifest(folder)
    verify_if_changed(found)
    return found


def _write_split(
    dataset: DatasetManifest, folder: Path, split: str, parts: Iterable[NDArray[np.uint16]]
) -> tuple[Shard, ...]:
    per_shard = int(dataset.settings.get("tokens_per_shard") or TOKENS_PER_SHARD)
    with ShardWriter(folder, split, per_shard) as writer:
        for ids in parts:
            writer.write(ids)
        return writer.close()


def _split(shards: tuple[Shard, ...], total: SplitCounts) -> Split:
    return Split(
        shards=shards,
        documents=total.documents,
        tokens=total.tokens,
        text_bytes=total.text_bytes,
    )


class _Counted(SplitCounts):
    """What goes by."""

    def counting(self, parts: Ids) -> Ids:
        for ids in parts:
            self.documents += int(np.count_nonzero(ids == END_OF_TEXT))
            self.tokens += ids.size
            text = ids[ids != END_OF_TEXT].tolist()
            self.text_bytes += len(load_tokenizer().decode_bytes(text))
            yield ids


def _drawn(units: Sequence[StoredUnit], share: float, phase: float) -> Ids:
    """A `share` of the documents, whole, in order, at even distances from `phase` in [0, 1) on:
    with a drawn phase each has the same chance."""
    passed = 0
    for unit in units:
        for block in _whole_documents(unit):
            starts = np.flatnonzero(block == END_OF_TEXT)
            lengths = np.diff(starts, append=block.size)
            places = np.floor(np.arange(passed, passed + starts.size + 1) * share + phase)
            passed += starts.size
            yield block[np.repeat(np.diff(places) > 0, lengths)]


def _whole_documents(unit: StoredUnit) -> Ids:
    """The unit's training ids in pieces that begin and end with a document; a document begins with
    its end-of-text."""
    rest = np.empty(0, dtype=np.uint16)
    for ids in unit.ids("train"):
        joined = np.concatenate([rest, ids])
        last = int(np.flatnonzero(joined == END_OF_TEXT)[-1])
        if last:
            yield joined[:last]
        rest = joined[last:]
    if rest.size:
        yield rest
