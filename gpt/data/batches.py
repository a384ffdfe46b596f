"""Shards to inputs and targets; owns the position in the data.

The training tokens are cut into sequences of `block_size` (plus the one token that the last
target needs), none across two shards. Every epoch visits each sequence once, in an order drawn
from (seed, epoch) alone; so a position, the number of sequences already taken, says exactly what
comes next, whatever the batch size and the number of restarts.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from gpt.artifacts import DatasetManifest, Split
from gpt.data.shards import check, open_shard
from gpt.errors import DatasetError, Problem

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, each (sequences, block_size) int64; targets are one token ahead."""


class Sequences:
    """Random access to the sequences of one split, memory-mapped. Raises `DatasetError` for a
    shard that is missing, short or altered, and for a split without one whole sequence."""

    def __init__(self, dataset: DatasetManifest, split: Split, block_size: int) -> None:
        check(dataset)
        self.block_size = block_size
        self._shards = [open_shard(dataset.folder / shard.name, shard) for shard in split.shards]
        counts = [max(0, len(shard) - 1) // block_size for shard in self._shards]
        self._ends = np.array(list(itertools.accumulate(counts)), dtype=np.int64)
        if not counts or not self._ends[-1]:
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

    def read(self, indices: np.ndarray) -> Batch:
        """The sequences at `indices`, in that order."""
        tokens = np.empty((len(indices), self.block_size + 1), dtype=np.int64)
        homes = np.searchsorted(self._ends, indices, side="right")
        for row, (index, home) in enumerate(zip(indices, homes, strict=True)):
            first = index - (self._ends[home - 1] if home else 0)
            start = int(first) * self.block_size
            tokens[row] = self._shards[home][start : start + self.block_size + 1]
        both = torch.from_numpy(tokens)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


class TrainingBatches:
    """Endless training batches from `position` (sequences taken or passed over) on."""

    def __init__(self, sequences: Sequences, seed: int, position: int = 0) -> None:
        self.sequences = sequences
        self.seed = seed
        self.position = position
        self._passed_over: list[tuple[int, int]] = []
        self._order_epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> Batch:
        """The next `count` sequences; moves the position."""
        places = self._next_places(count)
        epochs, offsets = np.divmod(places, len(self.sequences))
        # Sorted already: a batch that crosses an epoch's end takes the rest of one order first.
        indices = [
            self._epoch_order(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)
        ]
        return self.sequences.read(np.concatenate(indices))

    def skip(self, count: int) -> None:
        """Leave the next `count` sequences to others; moves the position as `take` does."""
        self._next_places(count)

    def pass_over(self, ranges: Iterable[tuple[int, int]]) -> None:
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

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._order_epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._order = generator.permutation(len(self.sequences))
            self._order_epoch = epoch
        return self._order


def validation_batches(sequences: Sequences, tokens: int, batch_size: int) -> Iterator[Batch]:
    """The first `tokens` tokens of the split in order, whole sequences, at most all there are.

    The last batch may be smaller.
    """
    count = min(len(sequences), max(1, tokens // sequences.block_size))
    for start in range(0, count, batch_size):
        yield sequences.read(np.arange(start, min(start + batch_size, count)))
