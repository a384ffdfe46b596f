"""Token shards to batches of inputs and targets, and the position in the data.

Training tokens are cut into sequences of `block_size` tokens, plus one for the last target; no
sequence spans two shards. Every epoch visits each sequence once, in an order drawn from (seed,
epoch) alone (`gpt.data.shuffle`). The position, a number of sequences, therefore determines what
comes next, whatever the batch size and the number of restarts.
"""

import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.artifacts import DatasetManifest, Split
from gpt.data.shards import open_shard, verify_if_changed
from gpt.data.shuffle import Permutation, shuffle_epoch
from gpt.errors import DatasetError, Problem

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, each (sequences, block_size) int64; targets are shifted by one token."""

MAX_OPEN_SHARDS = 8_192
"""Shards mapped at once. Linux allows a process 65,530 mappings (vm.max_map_count)."""


class SequenceDataset:
    """Random access to the sequences of one split through memory-mapped shards.

    Takes 8 bytes of memory per shard. Raises `DatasetError` for a shard that is missing, truncated
    or changed, and for a split shorter than one sequence.
    """

    def __init__(self, dataset: DatasetManifest, split: Split, block_size: int) -> None:
        verify_if_changed(dataset)
        self.block_size = block_size
        self._folder, self._shards = dataset.folder, split.shards
        self._open_cached = lru_cache(MAX_OPEN_SHARDS)(self._open)
        tokens = np.array([shard.tokens for shard in split.shards], dtype=np.int64)
        self._ends = np.cumsum(np.maximum(0, tokens - 1) // block_size)
        if not self._ends.size or not self._ends[-1]:
            rule = f"the split has {split.tokens} tokens, too few for one sequence and its target"
            remedy = "add text, lower model.block_size, or change data.validation_fraction"
            raise DatasetError(Problem("model.block_size", str(block_size), rule, remedy))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """Return the shard of each sequence in `indices`, (n,) int64, and its first token there."""
        shards = np.searchsorted(self._ends, indices, side="right")
        firsts = indices - np.where(shards, self._ends[shards - 1], 0)
        return list(zip(shards.tolist(), (firsts * self.block_size).tolist(), strict=True))

    def read(self, indices: np.ndarray) -> Batch:
        """Read the sequences at `indices`, in that order."""
        tokens = np.empty((len(indices), self.block_size + 1), dtype=np.int64)
        for row, (shard, start) in enumerate(self.locate(indices)):
            tokens[row] = self._open_cached(shard)[start : start + self.block_size + 1]
        both = torch.from_numpy(tokens)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def _open(self, number: int) -> np.memmap[Any, np.dtype[np.uint16]]:
        shard = self._shards[number]
        return open_shard(self._folder / shard.name, shard)


class TrainingLoader:
    """Endless training batches, starting at `position`: the number of sequences used or skipped."""

    def __init__(self, sequences: SequenceDataset, seed: int, position: int = 0) -> None:
        self.sequences = sequences
        self.seed = seed
        self.position = position
        self._excluded: list[tuple[int, int]] = []
        self._permutation: tuple[int, Permutation] | None = None

    def next_batch(self, count: int) -> Batch:
        """Read the next `count` sequences and advance the position."""
        positions = self._advance(count)
        epochs, offsets = np.divmod(positions, len(self.sequences))
        # np.unique sorts, so a batch across the end of an epoch uses the earlier epoch first.
        indices = [
            self.shuffle_epoch(int(epoch))(offsets[epochs == epoch]) for epoch in np.unique(epochs)
        ]
        return self.sequences.read(np.concatenate(indices))

    def skip(self, count: int) -> None:
        """Advance the position past the next `count` sequences, which other ranks read."""
        self._advance(count)

    def exclude_ranges(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Never read positions in these half-open ranges. Replaces earlier ranges."""
        self._excluded = sorted(ranges)

    def _advance(self, count: int) -> np.ndarray:
        """Return the next `count` positions that are not excluded, and move past them."""
        positions = []
        for start, end in [*self._excluded, (sys.maxsize, sys.maxsize)]:
            free = min(count, max(0, start - self.position))
            positions.append(np.arange(self.position, self.position + free))
            self.position, count = self.position + free, count - free
            if not count:
                break
            self.position = max(self.position, end)
        return np.concatenate(positions)

    def shuffle_epoch(self, epoch: int) -> Permutation:
        """Return the permutation of an epoch; the latest one is cached."""
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = None  # two permutations at once would take twice the memory
            self._permutation = epoch, shuffle_epoch(len(self.sequences), self.seed, epoch)
        return self._permutation[1]


def iterate_validation_batches(
    sequences: SequenceDataset, tokens: int, batch_size: int
) -> Iterator[Batch]:
    """Yield the first `tokens` tokens of the split in order, in whole sequences.

    Stops early if the split is shorter. The last batch may be smaller than `batch_size`.
    """
    count = min(len(sequences), max(1, tokens // sequences.block_size))
    for start in range(0, count, batch_size):
        yield sequences.read(np.arange(start, min(start + batch_size, count)))
