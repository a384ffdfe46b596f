"""Datasets derived from another one for a model that was trained on some of its files: the text for
continued pretraining, and the new validation text.

Training on new text alone makes a model forget the old. Replaying a fraction of the old text, with
the learning rate warmed up and decayed again, matches training from scratch on everything, within
one language and into another: Ibrahim et al. 2024 ("Simple and Scalable Strategies to Continually
Pre-train Large Language Models", arXiv:2403.08763). `REPLAY_FRACTION` is our choice; it was not
measured here.
"""

import itertools
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from gpt.artifacts import DatasetManifest, SourceFile, Split
from gpt.config.schema import fingerprint
from gpt.data.shards import (
    MANIFEST,
    REBUILD,
    ShardWriter,
    read_manifest,
    record_verified,
    verify_if_changed,
    write_manifest,
)
from gpt.data.tokenize.tokenizer import END_OF_TEXT, load_token_lengths
from gpt.data.tokenize.units import UNIT_JOURNAL, StoredUnit, read_stored_units
from gpt.errors import DatasetError, Problem
from gpt.files import PARTIAL, atomic_folder

DERIVED_DATASETS = "derived"
"""Folder beside `datasets` for datasets that no source gives by itself."""
REPLAY_FRACTION = 0.05
TOKENS_PER_SHARD = 100_000_000
"""For old manifests, which do not record it."""
FORMAT_VERSION = 1
"""Increased when the same values would give other shards."""

Ids = Iterator[NDArray[np.uint16]]


def find_dataset_by_fingerprint(roots: Iterable[Path], fingerprint: str) -> DatasetManifest | None:
    """Return the complete dataset with this fingerprint, derived or not, below one of `roots`."""
    kinds = ("datasets", DERIVED_DATASETS)
    for path in (p for root in roots for kind in kinds for p in root.glob(f"{kind}/*/{MANIFEST}")):
        with suppress(OSError, DatasetError):
            manifest = read_manifest(path.parent)
            if manifest.fingerprint == fingerprint:
                return manifest
    return None


def build_continued_dataset(
    dataset: DatasetManifest, known: Collection[str], min_tokens: int, parent: Path
) -> DatasetManifest:
    """Build the dataset for continued pretraining below `parent`, or return the one built before.

    It has all training documents of files whose SHA-256 is not in `known`, and an evenly spaced
    sample of the others that makes up `REPLAY_FRACTION` of its tokens, or more to reach
    `min_tokens`. The validation split is unchanged, so that models stay comparable. Returns
    `dataset` itself if no file is known. Raises `DatasetError` if there is no new training text or
    the journal of `dataset` is incomplete.
    """
    new, old = _separate_units(dataset, known)
    new_tokens, old_tokens = _count_tokens(new, "train"), _count_tokens(old, "train")
    if not new_tokens:
        rule = "the new files have no training documents"
        raise DatasetError(Problem(str(dataset.folder), "", rule, "wait for more text"))
    if not old:
        return dataset
    wanted = max(new_tokens * REPLAY_FRACTION / (1 - REPLAY_FRACTION), min_tokens - new_tokens)
    fraction = min(1.0, wanted / old_tokens) if old_tokens else 0.0

    def write(name: str, folder: Path) -> DatasetManifest:
        offset = np.random.default_rng(int(name[:16], 16)).random()
        ids = (ids for unit in new for ids in unit.ids("train"))
        sampled = _sample_documents(old, fraction, offset)
        train = _write_split(dataset, folder, "train", itertools.chain(ids, sampled))
        for shard in dataset.validation.shards:
            shutil.copyfile(dataset.folder / shard.name, folder / shard.name)
        note = (
            f"for continued pretraining: {new_tokens:,} new training tokens and "
            f"{train.tokens - new_tokens:,} of {old_tokens:,} old ones from dataset "
            f"{dataset.fingerprint[:16]}, with its validation split"
        )
        return dataset.model_copy(update={"train": train, "notes": (*dataset.notes, note)})

    values = {"replay_fraction": REPLAY_FRACTION, "least_tokens": min_tokens}
    return _build_once(dataset, known, {"what": "continuation", **values}, parent, write)


def build_new_validation_set(
    dataset: DatasetManifest, known: Collection[str], parent: Path
) -> DatasetManifest | None:
    """Build a dataset of the validation documents of files whose SHA-256 is not in `known`.

    It has no training split. Returns the one built before if there is one, and None if there are no
    such documents or no file is known. Raises `DatasetError` if the journal of `dataset` is
    incomplete.
    """
    new, old = _separate_units(dataset, known)
    if not (_count_tokens(new, "validation") and old):
        return None

    def write(_: str, folder: Path) -> DatasetManifest:
        ids = (ids for unit in new for ids in unit.ids("validation"))
        split = _write_split(dataset, folder, "validation", ids)
        note = f"the new validation text of dataset {dataset.fingerprint[:16]}"
        empty = Split(shards=(), documents=0, tokens=0, text_bytes=0)
        return dataset.model_copy(
            update={"train": empty, "validation": split, "notes": (*dataset.notes, note)}
        )

    return _build_once(dataset, known, {"what": "new validation text"}, parent, write)


def group_units_by_file(dataset: DatasetManifest) -> list[tuple[SourceFile, list[StoredUnit]]]:
    """Return each source with its units, in order. With `data.max_tokens`, the last sources may
    have fewer units or none.

    Raises `DatasetError` if the journal does not account for every training token.
    """
    stored = read_stored_units(dataset.folder)
    if _count_tokens(stored, "train") != dataset.train.tokens:
        rule = "does not account for the tokens of the manifest"
        raise DatasetError(Problem(str(dataset.folder / UNIT_JOURNAL), "", rule, REBUILD))
    units = iter(stored)
    grouped = []
    for source in dataset.sources:
        found: list[StoredUnit] = []
        rows = 0
        while rows < source.rows and (unit := next(units, None)):
            found.append(unit)
            rows += unit.entry.counts.rows
        grouped.append((source, found))
    return grouped


def _separate_units(
    dataset: DatasetManifest, known: Collection[str]
) -> tuple[list[StoredUnit], list[StoredUnit]]:
    """Return the units of new files and those of known files."""
    by_file = group_units_by_file(dataset)
    new = [unit for file, units in by_file if file.sha256 not in known for unit in units]
    return new, [unit for file, units in by_file if file.sha256 in known for unit in units]


def _count_tokens(units: Iterable[StoredUnit], split: str) -> int:
    return sum(unit.entry.counts.splits[split].tokens for unit in units)


def _build_once(
    dataset: DatasetManifest,
    known: Collection[str],
    values: dict[str, Any],
    parent: Path,
    write: Callable[[str, Path], DatasetManifest],
) -> DatasetManifest:
    """Return the dataset that `write(fingerprint, folder)` makes, or the existing one."""
    values = values | {
        "format": FORMAT_VERSION,
        "dataset": dataset.fingerprint,
        "known": sorted(file.sha256 for file in dataset.sources if file.sha256 in known),
    }
    name = fingerprint(values)
    folder = parent / name[:16]
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f".{folder.name}.lock"):
        if not (folder / MANIFEST).is_file():
            for leftover in parent.glob(f".{folder.name}.*{PARTIAL}"):  # of a killed process
                shutil.rmtree(leftover)
            with atomic_folder(folder) as partial:
                # The lengths of the documents of a part are not known.
                update = {"fingerprint": name, "folder": partial, "document_lengths": ()}
                manifest = write(name, partial).model_copy(update=update)
                write_manifest(manifest)
                record_verified(manifest)
    found = read_manifest(folder)
    verify_if_changed(found)
    return found


def _write_split(dataset: DatasetManifest, folder: Path, name: str, blocks: Ids) -> Split:
    per_shard = int(dataset.settings.get("tokens_per_shard") or TOKENS_PER_SHARD)
    documents = tokens = text_bytes = 0
    with ShardWriter(folder, name, per_shard) as writer:
        for ids in blocks:
            writer.write(ids)
            documents += int(np.count_nonzero(ids == END_OF_TEXT))
            tokens += ids.size
            text_bytes += int(load_token_lengths()[ids].sum())
        shards = writer.close()
    return Split(shards=shards, documents=documents, tokens=tokens, text_bytes=text_bytes)


def _sample_documents(units: Sequence[StoredUnit], fraction: float, offset: float) -> Ids:
    """Yield a `fraction` of the documents, whole and in order, at even distances.

    With `offset` drawn from [0, 1), every document has the same chance.
    """
    passed = 0
    for unit in units:
        for block in _read_whole_documents(unit):
            starts = np.flatnonzero(block == END_OF_TEXT)
            lengths = np.diff(starts, append=block.size)
            steps = np.floor(np.arange(passed, passed + starts.size + 1) * fraction + offset)
            passed += starts.size
            yield block[np.repeat(np.diff(steps) > 0, lengths)]


def _read_whole_documents(unit: StoredUnit) -> Ids:
    """Yield the unit's training ids in blocks of whole documents; each starts with end-of-text."""
    rest = np.empty(0, dtype=np.uint16)
    for ids in unit.ids("train"):
        joined = np.concatenate([rest, ids])
        last = int(np.flatnonzero(joined == END_OF_TEXT)[-1])
        if last:
            yield joined[:last]
        rest = joined[last:]
    if rest.size:
        yield rest
