"""Which card the figures are for: one that is named, or the one in this machine."""

from __future__ import annotations

import difflib
import subprocess
from dataclasses import dataclass
from functools import cache

from gpt.errors import Problem
from gpt.hardware.gpus import GPUS, MIB, GPUSpec, find_gpu

ASK = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
ASK_SECONDS = 10


@dataclass(frozen=True)
class TargetGPU:
    """A GPU to judge against. Without memory nothing is judged, without a card nothing is timed."""

    name: str
    card: GPUSpec | None
    memory_bytes: int | None
    free_bytes: int | None = None
    named: bool = False
    """Whether it was asked for by name, and so need not be in this machine."""
    found: int = 0
    """GPUs in this machine, where that was asked."""

    @property
    def warning(self) -> Problem | None:
        """What is wrong with the name, if it was asked for by name and nobody knows it."""
        if not self.named or self.card:
            return None
        keys = [card.key for card in GPUS]
        near = difflib.get_close_matches(self.name.lower().replace(" ", "-"), keys, n=3, cutoff=0.4)
        return Problem(
            "--gpu",
            self.name,
            "is not in the table of cards (gpt/hardware/gpus.py), so fit and hours are n/a",
            f"did you mean {' or '.join(near)}?" if near else "name one as rtx-4070, or auto",
        )


def find_target_gpu(gpu: str = "auto") -> TargetGPU:
    """`gpu`: a card's name, or auto for the first card of this machine, where there is one."""
    if gpu != "auto":
        card = find_gpu(gpu)
        return TargetGPU(gpu, card, card.memory_bytes if card else None, named=True)
    found = _cards_here()
    if not found:
        return TargetGPU("no GPU", None, None)
    name, memory_bytes, free_bytes = found[0]
    card = find_gpu(name, memory_bytes)
    return TargetGPU(name, card, memory_bytes, free_bytes, found=len(found))


@cache
def _cards_here() -> tuple[tuple[str, int, int], ...]:
    """Name, memory and free memory of each GPU, as the driver's own tool tells: torch would take
    seconds. Empty where there is no such tool."""
    try:
        done = subprocess.run(ASK, capture_output=True, text=True, timeout=ASK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(_card_line(line) for line in done.stdout.splitlines() if line.count(",") >= 2)


def _card_line(line: str) -> tuple[str, int, int]:
    name, total, free = (part.strip() for part in line.rsplit(",", 2))
    # Cards that share their memory with the processor tell none.
    sizes = [int(size) * MIB if size.isdigit() else 0 for size in (total, free)]
    return name, sizes[0], sizes[1]
