"""The data set with which a model goes on: the text that is new to it, and a share of the rest.

Training on new text alone makes a network forget the old. Replaying 5% of old tokens among the new
prevents most of that where the texts are of one kind (Ibrahim et al. 2024, "Simple and Scalable
Strategies to Continually Pre-train Large Language Models", arXiv:2403.08763, section 6; 25% for
another language). It is made out of the shards of the whole data set, of which it has the
validation side as it is, so that it is evaluated on the same slice.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt.artifacts import DatasetManifest, SourceFile, Split
from gpt.config import fingerprint
from gpt.data.shards import (
    MANIFEST,
    REMEDY,
    ShardWriter,
    check,
    read_manifest,
    remember_checked,
    write_manifest,
)
from gpt.data.tokenizer import END_OF_TEXT, load_tokenizer
from gpt.data.units import JOURNAL, Stored, stored_units
from gpt.errors import DatasetError, Problem
from gpt.files import new_folder

CONTINUATIONS = "continuations"
"""Their place beside `datasets`: none is what its sources make."""
REPLAY_FRACTION = 0.05
FORMAT_VERSION = 1
"""Raised when the same values would give other shards."""


def continuation(
    dataset: DatasetManifest, known: Collection[str], least_tokens: int, parent: Path
) -> DatasetManifest:
    """Of `dataset`, the training documents of the files that are not among the SHA-256 `known`, and
    of the others as many, drawn at random, as make up `REPLAY_FRACTION` of all its tokens, or
    `least_tokens`. Where nothing is known, `dataset` itself.

    Content-addressed below `parent`, made once. Raises `DatasetError` where there is no new
    training text, or where the journal of `dataset` is not whole.
    """
    by_file = units_by_file(dataset)
    new = [unit for file, units in by_file if file.sha256 not in known for unit in units]
    old = [unit for file, units in by_file if file.sha256 in known for unit in units]
    if not _tokens(new):
        rule = "the new files have no document for training"
        raise DatasetError(Problem(str(dataset.folder), "", rule, "wait for more text"))
    if not old:
        return dataset
    values = {
        "format": FORMAT_VERSION,
        "dataset": dataset.fingerprint,
        "known": sorted(file.sha256 for file, _ in by_file if file.sha256 in known),
        "replay_fraction": REPLAY_FRACTION,
        "least_tokens": least_tokens,
    }
    name = fingerprint(values)
    folder = parent / name[:16]
    if not (folder / MANIFEST).is_file():
        with new_folder(folder) as partial:
            _write(dataset, name, partial, new, old, least_tokens)
    made = read_manifest(folder)
    check(made)
    return made


def units_by_file(dataset: DatasetManifest) -> list[tuple[SourceFile, list[Stored]]]:
    """Each source with its units, in order; with data.max_tokens the last may have fewer, or none.
    Raises `DatasetError` where the journal does not account for every token."""
    stored = stored_units(dataset.folder)
    if _tokens(stored) != dataset.train.tokens:
        rule = "does not account for the tokens of the manifest"
        raise DatasetError(Problem(str(dataset.folder / JOURNAL), "", rule, REMEDY))
    units = iter(stored)
    found = []
    for source in dataset.sources:
        mine: list[Stored] = []
        rows = 0
        while rows < source.rows and (unit := next(units, None)):
            mine.append(unit)
            rows += unit.entry.tally.rows
        found.append((source, mine))
    return found


def _tokens(units: Iterable[Stored]) -> int:
    return sum(unit.entry.tally.sides["train"].tokens for unit in units)


def _write(
    dataset: DatasetManifest,
    name: str,
    folder: Path,
    new: Sequence[Stored],
    old: Sequence[Stored],
    least_tokens: int,
) -> None:
    """The folder's shards, copied and chosen, and the manifest last."""
    wanted = max(
        _tokens(new) * REPLAY_FRACTION / (1 - REPLAY_FRACTION), least_tokens - _tokens(new)
    )
    share = min(1.0, wanted / _tokens(old)) if _tokens(old) else 0.0
    replayed = _Counted()
    per_shard = int(dataset.settings["tokens_per_shard"] or 0)
    with ShardWriter(folder, "train", per_shard) as writer:
        for unit in new:
            for ids in unit.ids("train"):
                writer.write(ids)
        for ids in _drawn(old, share, np.random.default_rng(int(name[:16], 16))):
            replayed.add(ids)
            writer.write(ids)
        shards = writer.close()
    for shard in dataset.validation.shards:
        shutil.copyfile(dataset.folder / shard.name, folder / shard.name)
    sides = [unit.entry.tally.sides["train"] for unit in new]
    train = Split(
        shards=shards,
        documents=sum(side.documents for side in sides) + replayed.documents,
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(side.text_bytes for side in sides) + replayed.text_bytes,
    )
    note = (
        f"goes on from an earlier model: {_tokens(new):,} training tokens that are new to it and "
        f"{replayed.tokens:,} of {_tokens(old):,} that it knows, of data set "
        f"{dataset.fingerprint[:16]}, whose validation side it has"
    )
    made = dataset.model_copy(
        update={
            "fingerprint": name,
            "folder": folder,
            "train": train,
            "notes": (*dataset.notes, note),
            "document_lengths": (),  # those that are replayed are not counted
        }
    )
    write_manifest(made)
    remember_checked(made)


class _Counted:
    """What was replayed."""

    def __init__(self) -> None:
        self.documents = self.tokens = self.text_bytes = 0

    def add(self, ids: NDArray[np.uint16]) -> None:
        ends = int(np.count_nonzero(ids == END_OF_TEXT))
        text = ids[ids != END_OF_TEXT].tolist()
        self.documents += ends
        self.tokens += ids.size
        self.text_bytes += len(load_tokenizer().decode_bytes(text))


def _drawn(
    units: Iterable[Stored], share: float, generator: np.random.Generator
) -> Iterator[NDArray[np.uint16]]:
    """Each document with the same chance, whole, in order."""
    for unit in units:
        for block in _whole_documents(unit):
            starts = np.flatnonzero(block == END_OF_TEXT)
            lengths = np.diff(starts, append=block.size)
            chosen = generator.random(starts.size) < share
            yield block[np.repeat(chosen, lengths)]


def _whole_documents(unit: Stored) -> Iterator[NDArray[np.uint16]]:
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
