"""The table of GPUs, `gpus.csv`, and the search for one by name."""

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, TypeAdapter

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class GPUSpec:
    """A row of `gpus.csv`, whose header says what the columns mean and where they come from."""

    key: str
    """Name to type, e.g. rtx-4070."""
    name: str
    """Name by `torch.cuda.get_device_name`."""
    memory_mib: int
    bandwidth_gbs: float
    """Of the memory, 10^9 bytes per second."""
    tflops: float | None
    """Dense 16-bit peak with float32 accumulation, 10^12 FLOPs per second; None: no tensor core."""
    low_tflops: float | None
    """Peak at the lowest power limit of laptops with this GPU; None for others."""
    compute_capability: Annotated[tuple[int, int], BeforeValidator(lambda text: text.split("."))]
    sms: int
    lanes: int | None
    """Of PCI Express; None for laptops."""
    nvlink_gbs: float | None
    """Both directions together."""
    aliases: Annotated[
        tuple[str, ...], BeforeValidator(lambda text: text.split("; ") if text else ())
    ]
    source: str
    """Source of the peak."""

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MIB

    @property
    def has_bfloat16(self) -> bool:
        return self.compute_capability >= (8, 0)

    def peak_tflops(self, dtype: str) -> float | None:
        """Return the peak for `training.dtype`: float16 for bfloat16 if the GPU lacks it; for
        float32 TF32, half of bfloat16. None if no tensor core multiplies that dtype."""
        if self.tflops is None or dtype != "float32":
            return self.tflops
        return self.tflops / 2 if self.has_bfloat16 else None


def read_rows(name: str) -> list[dict[str, str]]:
    """Read a CSV file beside this module. Lines that begin with # are its header."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


GPUS = tuple(
    TypeAdapter(GPUSpec).validate_python({key: value or None for key, value in row.items()})
    for row in read_rows("gpus.csv")
)


def find_gpu(name: str, memory_bytes: int | None = None) -> GPUSpec | None:
    """Find a GPU by its key or another name: `rtx-4070`, "RTX 4070 Ti Super", torch's name.

    Laptop, Ti, Super, PCIe, SXM and MIG variants are different GPUs. `memory_bytes`, as reported by
    the driver, decides between GPUs with the same name. Returns None if the table has no such GPU.
    """
    words, size_gb = _parse_name(name)
    # The 480 GB in a GH200's name are the CPU's, so a name as torch gives it is taken literally.
    named = [gpu for gpu in GPUS if gpu.name.lower() == name.lower()]
    matches = named or [gpu for gpu in GPUS if words in _names(gpu)]
    if size_gb is not None and not named:
        # A GPU sold as 80 GB may have 79 GiB: error correction and decimal units take some.
        sizes = range(round(size_gb * 0.9), size_gb + 2)
        matches = [gpu for gpu in matches if round(gpu.memory_bytes / GIB) in sizes]
    if memory_bytes is None or not matches:
        return matches[0] if matches else None
    return min(matches, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes))


_IGNORED_WORDS = {"nvidia", "geforce", "tesla", "gpu", "generation", "edition", "workstation"}
_SYNONYMS = {"mobile": "laptop", "sxm2": "sxm", "sxm3": "sxm", "sxm4": "sxm", "sxm5": "sxm"}


@cache
def _names(gpu: GPUSpec) -> frozenset[frozenset[str]]:
    """The words of each of its names."""
    return frozenset(_parse_name(name)[0] for name in (gpu.key, gpu.name, *gpu.aliases))


def _parse_name(name: str) -> tuple[frozenset[str], int | None]:
    """Return the words that identify a GPU, and its memory in GB if the name has it."""
    text = name.lower()
    size = re.search(r"\b(\d+)\s*gi?b\b", text)
    if size:
        text = text.replace(size[0], " ")
    text = re.sub(r"\b(rtx|gtx)(?=\d)", r"\1 ", text)
    text = re.sub(r"(?<=\d)(ti|super)\b", r" \1", text.replace("tisuper", "ti super"))
    words = {_SYNONYMS.get(word, word) for word in re.findall(r"[a-z0-9]+", text)}
    return frozenset(words - _IGNORED_WORDS), int(size[1]) if size else None
