"""The order in which an epoch visits its sequences, drawn from (seed, epoch) alone.

The order is the same on every machine, and any position can be looked up without computing the
positions before it. The number of sequences alone decides which method is used:

- up to `MAX_FULL_SHUFFLE`: numpy's shuffle, which takes 8 bytes per sequence;
- above: a pseudo-random permutation computed per position, which takes no memory. It is a Feistel
  network (Luby and Rackoff 1988, "How to construct pseudorandom permutations from pseudorandom
  functions") over the next power of two, applied again while the result is out of range (cycle
  walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Mitchell et al. 2021
  ("Bandwidth-optimal random shuffling for GPUs", arXiv:2106.06161) evaluate it for shuffling.

10^13 tokens in sequences of 1,024 are 10^10 sequences: an 80 GB shuffle, or a few numbers.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MAX_FULL_SHUFFLE = 2**27
"""Most sequences that are shuffled in memory: 1 GiB per process. Changing this number would change
the order of existing runs, so it never changes."""
ROUNDS = 8
"""Twice the four rounds at which Luby and Rackoff's network withstands queries in both directions.
Even, so that halves of unequal width end where they began."""

Positions = NDArray[np.int64]
Permutation = Callable[[Positions], Positions]
"""Maps positions in the epoch, (n,) int64, to sequence indices, (n,) int64."""


def shuffle_epoch(count: int, seed: int, epoch: int) -> Permutation:
    """Return the permutation of `count` sequences for one epoch."""
    if count > MAX_FULL_SHUFFLE:
        return FeistelPermutation(count, seed, epoch)
    shuffled = np.random.default_rng((seed, epoch)).permutation(count)
    return lambda positions: shuffled[positions]


class FeistelPermutation:
    """A permutation of 0 to `count` - 1, computed only for the requested positions."""

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        assert 1 <= count <= 2**62
        self._count = count
        bits = max(2, (count - 1).bit_length())
        self._left_bits, self._right_bits = bits - bits // 2, bits // 2
        # numpy guarantees that a SeedSequence gives the same words in every version.
        self._keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)

    def __call__(self, positions: Positions) -> Positions:
        found = self._permute(positions.astype(np.uint64))
        # The power of two is less than twice the count, so at most half are permuted again.
        while (outside := found >= self._count).any():
            found[outside] = self._permute(found[outside])
        return found.astype(np.int64)

    def _permute(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Apply the network once, over the whole power of two."""
        left_bits, right_bits = self._left_bits, self._right_bits
        left = values >> np.uint64(right_bits)
        right = values & np.uint64(2**right_bits - 1)
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & np.uint64(2**left_bits - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators"): every input bit affects all 64 output bits. Products wrap."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
