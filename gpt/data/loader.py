"""Shards to inputs and targets; owns the position in the data.

The training tokens are cut into sequences of `block_size` (plus the one token that the last
target needs), none across two shards. Every epoch visits each sequence once, in an order drawn
from (seed, epoch) alone (`gpt.data.shuffle`); so a position, the number of sequences already taken,
says exactly what comes next, whatever the batch size and the number of restarts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt.artifacts import DatasetManifest, Split
from gpt.data.shards import open_shard, verify_if_changed
from gpt.data.shuffle import Permutation, shuffle_epoch
from gpt.errors import DatasetError, Problem

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, each (sequences, block_size) int64; targets are one token ahead."""


MAX_OPEN_SHARDS = 8_192
"""Shards mapped at once: Linux gives a process 65,530 mappings (vm.max_map_count)."""


class SequenceLocation(NamedTuple):
    """Where a sequence lies."""

    shard: int
    """Number of the shard in its split."""
    first_token: int
    """In that shard."""


class SequenceDataset:
    """Random access to the sequences of one split, memory-mapped, 8 bytes of memory a shard and
    those that were read last open. Raises `DatasetError` for a shard that is missing, short or
    altered, and for a split without one whole sequence."""

    def __init__(self, dataset: DatasetManifest, split: Split, block_size: int) -> None:
        verify_if_changed(dataset)
        self.block_size = block_size
        self._folder, self._shards = dataset.folder, split.shards
        self._opened = lru_cache(MAX_OPEN_SHARDS)(self._open)
        tokens = np.array([shard.tokens for shard in split.shards], dtype=np.int64)
        self._ends = np.cumsum(np.maximum(0, tokens - 1) // block_size)
        if not self._ends.size or not self._ends[-1]:
            raise DatasetError(
                Problem(
                    "model.block_size",
                    str(block_size),
                    f"the split has {split.tokens} tokens, too few for one sequence and its target",
                    "give more text, a smaller model.block_size, or another "
                    "data.validation_fraction",
                )
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def homes(self, indices: np.ndarray) -> list[SequenceLocation]:
        """Where the sequences at `indices`, (n,) int64, lie."""
        shards = np.searchsorted(self._ends, indices, side="right")
        firsts = indices - np.where(shards, self._ends[shards - 1], 0)
        pairs = zip(shards.tolist(), (firsts * self.block_size).tolist(), strict=True)
        return [SequenceLocation(shard, first_token) for shard, first_token in pairs]

    def read(self, indices: np.ndarray) -> Batch:
        """The sequences at `indices`, in that order."""
        tokens = np.empty((len(indices), self.block_size + 1), dtype=np.int64)
        for row, (shard, start) in enumerate(self.homes(indices)):
            tokens[row] = self._opened(shard)[start : start + self.block_size + 1]
        both = torch.from_numpy(tokens)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def _open(self, number: int) -> np.memmap[Any, np.dtype[np.uint16]]:
        shard = self._shards[number]
        return open_shard(self._folder / shard.name, shard)


class TrainingLoader:
    """Endless training batches from `position` (sequences taken or passed over) on."""

    def __init__(self, sequences: SequenceDataset, seed: int, position: int = 0) -> None:
        self.sequences = sequences
        self.seed = seed
        self.position = position
        self._passed_over: list[tuple[int, int]] = []
        self._order: tuple[int, Permutation] | None = None

    def next_batch(self, count: int) -> Batch:
        """The next `count` sequences; moves the position."""
        places = self._next_places(count)
        epochs, offsets = np.divmod(places, len(self.sequences))
        # Sorted already: a batch that crosses an epoch's end takes the rest of one order first.
        indices = [
            self.shuffle_epoch(int(epoch))(offsets[epochs == epoch]) for epoch in np.unique(epochs)
        ]
        return self.sequences.read(np.concatenate(indices))

    def skip(self, count: int) -> None:
        """Leave the next `count` sequences to others; moves the position as `next_batch` does."""
        self._next_places(count)

    def exclude_ranges(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Positions, first and one after the last, that are never taken; replaces those before."""
        self._passed_over = sorted(ranges)

    def _next_places(self, count: int) -> np.ndarray:
        """Positions of the next `count` sequences; moves the position."""
        places = []
        for start, end in [*self._passed_over, (sys.maxsize, sys.maxsize)]:
            free = min(count, max(0, start - self.position))
            places.append(np.arange(self.position, self.position + free))
            self.position, count = self.position + free, count - free
            if not count:
                break
            self.position = max(self.position, end)
        return np.concatenate(places)

    def shuffle_epoch(self, epoch: int) -> Permutation:
        """The order of an epoch; the one asked for last is kept."""
        if self._order is None or self._order[0] != epoch:
            self._order = None  # two shuffles at once would take twice the memory
            self._order = epoch, shuffle_epoch(len(self.sequences), self.seed, epoch)
        return self._order[1]


def iterate_validation_batches(
    sequences: SequenceDataset, tokens: int, batch_size: int
) -> Iterator[Batch]:
    """The first `tokens` tokens of the split in order, whole sequences, at most all there are.

    The last batch may be smaller.
    """
    count = min(len(sequences), max(1, tokens // sequences.block_size))
    for start in range(0, count, batch_size):
        yield sequences.read(np.arange(start, min(start + batch_size, count)))
