"""The card of the tests: a stub driver that keeps books (run_on_cards.py, driver/card.c)."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cards import CARD, CARDS, CardModel

HERE = Path(__file__).parent
LAUNCHES = (
    *("cudaLaunchKernel", "__cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel"),
    *("cuLaunchKernelEx", "cudaLaunchCooperativeKernel", "cuLaunchCooperativeKernel"),
)
SYNCHRONIZATIONS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
)
CUDA_OUT_OF_MEMORY = 2
"""Of the runtime and of the driver alike."""


@dataclass
class Counts:
    """What happened while it was counted."""

    launches: int = 0
    """Kernels other than matrix products of cuBLAS."""
    synchronizations: int = 0
    """Times that the host waited for the device."""
    copies_to_host: int = 0


class Card:
    """The books of the stub driver in this process."""

    def __init__(self, model: CardModel) -> None:
        self.model = model
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._driver.card_calls.restype = self._driver.card_copies_to_host.restype = ctypes.c_long
        self._driver.card_limit_memory.argtypes = [ctypes.c_size_t]

    def calls(self, *functions: str) -> int:
        """Calls so far of functions of CUDA, by name."""
        return sum(self._driver.card_calls(name.encode()) for name in functions)

    def _read(self) -> Counts:
        copies = self._driver.card_copies_to_host()
        return Counts(self.calls(*LAUNCHES), self.calls(*SYNCHRONIZATIONS), copies)

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Yield counts that are filled in at the end of the block."""
        before, counts = self._read(), Counts()
        yield counts
        for name, count in vars(self._read()).items():
            setattr(counts, name, count - getattr(before, name))

    def limit_memory(self, size_bytes: int | None) -> None:
        """Refuse memory beyond that; None: beyond the card's own."""
        self._driver.card_limit_memory(size_bytes or 0)

    def fail_once(
        self, function: str, error: int = CUDA_OUT_OF_MEMORY, successful_calls: int = 0
    ) -> None:
        """Let a function of CUDA, by name, return an error once, after some successful calls."""
        self._driver.card_fail_once(function.encode(), error, ctypes.c_long(successful_calls))

    def clear_failures(self) -> int:
        """Take back the failures that have not happened; return how many there were."""
        return int(self._driver.card_clear_failures())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests that are meant for this process's card."""
    if (card := os.environ.get(CARD)) is None:
        return
    for_others = []
    for item in items:
        marker = item.get_closest_marker("cards")
        if HERE in item.path.parents and card not in (marker.args if marker else ("rtx4070",)):
            for_others.append(item)
    config.hook.pytest_deselected(items=for_others)
    items[:] = [item for item in items if item not in for_others]


@pytest.fixture(scope="session", autouse=True)
def stub_driver() -> Card:
    if (key := os.environ.get(CARD)) is None:
        pytest.skip("no stub card in this process: `make test-cuda` runs the tests of tests/cuda")
    import torch

    # cuDNN, which an H100 would use, asks the driver for more than the stub knows.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return Card(CARDS[key])


@pytest.fixture(autouse=True)
def card(stub_driver: Card) -> Iterator[Card]:
    """The card, with all of its memory; afterwards nothing of the test is left on it."""
    import torch

    yield stub_driver
    stub_driver.limit_memory(None)
    stub_driver.clear_failures()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.memory_allocated():
        gc.collect()
    torch.cuda.empty_cache()
