"""The cards that the stub driver can be, as its environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CARD = "OVERNIGHT_TEST_CARD"
"""Environment variable: the key in `CARDS` of the card that this process has."""


@dataclass(frozen=True)
class CardModel:
    name: str
    capability: str
    memory_mib: int
    multiprocessors: int
    shared_kib_per_block: int = 99
    """What a kernel can opt in to: CUDA C++ programming guide, "compute capabilities"."""
    threads_per_multiprocessor: int = 1536
    devices: int = 1


CARDS = {
    "rtx4070": CardModel("NVIDIA GeForce RTX 4070", "8.9", 12282, 46),
    "rtx3060": CardModel("NVIDIA GeForce RTX 3060", "8.6", 12288, 28),
    "t4": CardModel("Tesla T4", "7.5", 15360, 40, 64, 1024),
    "h100": CardModel("NVIDIA H100 80GB HBM3", "9.0", 81559, 132, 227, 2048),
    "rtx5070": CardModel("NVIDIA GeForce RTX 5070", "12.0", 12227, 48),
    "two_rtx4070": CardModel("NVIDIA GeForce RTX 4070", "8.9", 12282, 46, devices=2),
}


def card_environment(key: str, driver: Path) -> dict[str, str]:
    """Return the environment in which torch's CUDA build finds cards of a model.

    It must be set before a process starts: the driver in the folder `driver` is loaded first.
    """
    card = CARDS[key]
    kernels = driver / f"kernels-{card.capability}"
    return {
        **os.environ,
        CARD: key,
        "CARD_NAME": card.name,
        "CARD_CAPABILITY": card.capability,
        "CARD_MEMORY_BYTES": str(card.memory_mib * 2**20),
        "CARD_MULTIPROCESSORS": str(card.multiprocessors),
        "CARD_SHARED_BYTES_PER_BLOCK": str(card.shared_kib_per_block * 1024),
        "CARD_THREADS_PER_MULTIPROCESSOR": str(card.threads_per_multiprocessor),
        "CARD_DEVICES": str(card.devices),
        "LD_LIBRARY_PATH": str(driver),
        "LD_PRELOAD": str(driver / "libcuda.so.1"),
        "TRITON_LIBCUDA_PATH": str(driver),
        "TORCHINDUCTOR_CACHE_DIR": str(kernels),
        "TRITON_CACHE_DIR": str(kernels / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more would be processes that load torch, too
    }
