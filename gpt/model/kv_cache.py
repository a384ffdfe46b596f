"""Keys and values of the tokens seen so far, so that generating a token costs one forward pass of
one token.
"""

import torch
from torch import Tensor

from gpt.config.schema import ModelSection


class LayerKVCache:
    """The cache of one block: room for `block_size` tokens, allocated on first use."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.length = 0
        self._keys_values = torch.empty(0)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values, (batch, n_head, time, head size), and return all of them.

        The first call may bring many tokens, every later one a single token: attention then needs
        the plain causal mask or none.
        """
        time = keys.shape[2]
        assert self.length == 0 or time == 1, "a cache in use takes one token at a time"
        assert self.length + time <= self.block_size, "the cache is full"
        if self.length == 0:
            batch, heads, _, size = keys.shape
            self._keys_values = keys.new_empty((2, batch, heads, self.block_size, size))
        end = self.length + time
        self._keys_values[0, :, :, self.length : end] = keys
        self._keys_values[1, :, :, self.length : end] = values
        self.length = end
        return self._keys_values[0, :, :, :end], self._keys_values[1, :, :, :end]


class KVCache:
    """The cache of all blocks, for one batch of sequences being generated."""

    def __init__(self, config: ModelSection) -> None:
        self.layers = [LayerKVCache(config.block_size) for _ in range(config.n_layer)]

    @property
    def length(self) -> int:
        """Tokens seen, which is the position of the next one."""
        return self.layers[0].length
