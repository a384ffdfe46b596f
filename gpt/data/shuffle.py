"""The order in which an epoch visits its sequences, drawn from (seed, epoch) alone: the same on
every machine, and any place in it known without the places before.

Which of two orders it is, the number of sequences decides and nothing else:

- up to `MAX_FULL_SHUFFLE` a whole shuffle, numpy's, which takes 8 bytes a sequence;
- beyond, a pseudo-random permutation that is computed place by place and takes no memory: a Feistel
  network (Luby and Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom
  functions") over the next power of two, walked again where it leaves the range (cycle walking:
  Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). For shuffling it was measured by
  Mitchell et al. 2021 ("Bandwidth-optimal random shuffling for GPUs", arXiv:2106.06161).

10^13 tokens in sequences of 1,024 are 10^10 sequences: 80 GB of shuffle, or a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MAX_FULL_SHUFFLE = 2**27
"""Most sequences that are shuffled as a whole: 1 GiB for each process. Runs on up to so many go on
in the order that they began with, so this number never changes."""
ROUNDS = 8
"""Twice the four after which Luby and Rackoff's network resists whoever may ask both ways; even, so
that unequal halves end where they began."""

Places = NDArray[np.int64]
Permutation = Callable[[Places], Places]
"""From places in the epoch, (n,) int64, to indices of sequences, (n,) int64."""


def shuffle_epoch(count: int, seed: int, epoch: int) -> Permutation:
    """The order of `count` sequences in an epoch; each place has another sequence."""
    if count > MAX_FULL_SHUFFLE:
        return FeistelPermutation(count, seed, epoch)
    shuffled = np.random.default_rng((seed, epoch)).permutation(count)
    return lambda places: shuffled[places]


class FeistelPermutation:
    """A permutation of 0 to `count` - 1, computed for the places that are asked for."""

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        assert 1 <= count <= 2**62
        self._count = count
        bits = max(2, (count - 1).bit_length())
        self._left_bits, self._right_bits = bits - bits // 2, bits // 2
        # numpy promises that a SeedSequence gives the same words in every version.
        self._keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)

    def __call__(self, places: Places) -> Places:
        found = self._permuted(places.astype(np.uint64))
        # The power of two is under twice the count, so half of the places at most go round again.
        while (outside := found >= self._count).any():
            found[outside] = self._permuted(found[outside])
        return found.astype(np.int64)

    def _permuted(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One walk over the whole power of two."""
        left_bits, right_bits = self._left_bits, self._right_bits
        left = values >> np.uint64(right_bits)
        right = values & np.uint64(2**right_bits - 1)
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & np.uint64(2**left_bits - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of a value spread over 64: the end of SplitMix64 (Steele, Lea and Flood 2014, "Fast
    splittable pseudorandom number generators"). Products wrap."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
