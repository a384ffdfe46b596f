"""Keys and values of the tokens that a network has seen, so that the next token costs one token."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt.config.schema import ModelSection


class LayerKVCache:
    """Of one block: room for `block_size` tokens, taken when the first ones come."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.length = 0
        self._both = torch.empty(0)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (batch, n_head, time, head size) and return all there are.

        Many tokens may come when there are none yet, later one at a time: attention then needs no
        mask but the causal one or none.
        """
        time = keys.shape[2]
        assert self.length == 0 or time == 1, "a cache that is begun takes one token at a time"
        assert self.length + time <= self.block_size, "the cache is full"
        if self.length == 0:
            batch, heads, _, size = keys.shape
            self._both = keys.new_empty((2, batch, heads, self.block_size, size))
        end = self.length + time
        self._both[0, :, :, self.length : end] = keys
        self._both[1, :, :, self.length : end] = values
        self.length = end
        return self._both[0, :, :, :end], self._both[1, :, :, :end]


class KVCache:
    """Of all blocks; one for each text that is being written."""

    def __init__(self, config: ModelSection) -> None:
        self.blocks = [LayerKVCache(config.block_size) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Tokens seen; the position of the next."""
        return self.blocks[0].length
