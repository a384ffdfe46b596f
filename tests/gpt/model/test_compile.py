"""Compiled networks live no longer than their users need them."""

import gc
import weakref

import torch
from torch import nn

from gpt.model.compile import compile_if_supported, find_compiler_error


def test_compiled_network_and_its_gradients_are_freed():
    assert find_compiler_error("cpu") is None  # or nothing would be compiled

    def train_once():
        network = nn.Linear(4, 4)
        compile_if_supported(network, torch.device("cpu"))(torch.ones(2, 4)).sum().backward()
        weight = network.weight
        return [weakref.ref(part) for part in (network, weight, weight.grad)]

    references = train_once()
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
