"""Table of GPUs: memory, peak FLOPs, and their names in torch.

Peaks are for dense 16-bit matrix products with float32 accumulation, as training uses them: half of
what NVIDIA advertises for a GeForce with float16 accumulation, a quarter of the figure with
sparsity. Most are tensor cores x boost clock x FLOPs per core and clock, the formula of llm.c's
`llmc/mfu.h`. With float32 accumulation one tensor core computes per clock

- 64 on a GeForce of Turing, 128 on other Turing GPUs and on Volta,
- 128 on a GeForce of Ampere, Ada and Blackwell, 256 on workstation and server GPUs of those,
- 512 on A100, 1,024 on Hopper.

Checked against NVIDIA's own figures: RTX 3090 71 (GA102 whitepaper), RTX 4090 165.2 and RTX 4080
97.5 (Ada whitepaper), RTX 5090 209.5 (RTX Blackwell whitepaper), RTX A6000 154.8, RTX 6000 Ada
364.2, A100 312, H100 989. For laptops the boost clock is the highest of NVIDIA's range; the maker
sets the power limit, so few reach it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True)
class GPUSpec:
    key: str
    """Name to type, e.g. rtx-4070."""
    name: str
    """Name by `torch.cuda.get_device_name`."""
    memory_mib: int
    """Total memory; with error correction, what nvidia-smi shows."""
    tflops: float
    """Dense 16-bit peak with float32 accumulation, 10^12 FLOPs per second."""
    compute_capability: tuple[int, int]
    source: str
    """Source of the peak: the formula for a GeForce, otherwise the figure of the data sheet. The
    peak is half of a figure for sparse matrices, a quarter for fp8, an eighth for fp4 (sparse)."""
    aliases: tuple[str, ...] = ()
    """Other names of the same GPU."""

    @property
    def memory_bytes(self) -> int:
        return self.memory_mib * MIB

    @property
    def has_bfloat16(self) -> bool:
        return self.compute_capability >= _A100

    def peak_tflops(self, dtype: str) -> float | None:
        """Return the peak for `training.dtype`: float16 for bfloat16 if the GPU lacks it; for
        float32 TF32, half of bfloat16. None if no tensor core multiplies that dtype."""
        if dtype == "float32":
            return self.tflops / 2 if self.has_bfloat16 else None
        return self.tflops


def find_gpu(name: str, memory_bytes: int | None = None) -> GPUSpec | None:
    """Find a GPU by its key or another name: `rtx-4070`, "RTX 4070 Ti Super", torch's name.

    Laptop, Ti, Super, PCIe, SXM and MIG variants are different GPUs. `memory_bytes`, as reported by
    the driver, decides between GPUs with the same name. Returns None if the table has no such GPU.
    """
    words, size_gb = _parse_name(name)
    matches = [gpu for gpu in GPUS if words in _names(gpu)]
    if size_gb is not None:
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


# --- the table -----------------------------------------------------------------------------------

_MFU_H = "llm.c mfu.h"
_COMPARE = "nvidia.com GeForce laptops, compare"


_VOLTA, _TURING, _A100, _AMPERE = (7, 0), (7, 5), (8, 0), (8, 6)
_ADA, _HOPPER, _BLACKWELL = (8, 9), (9, 0), (12, 0)
_TURING_PAPER = "NVIDIA Turing whitepaper"
_BLACKWELL_PAPER = "NVIDIA RTX Blackwell whitepaper"


def _geforce(
    name: str,
    memory_gib: int,
    tensor_cores: int,
    boost_mhz: int,
    capability: tuple[int, int],
    source: str,
) -> GPUSpec:
    """A GeForce, which halves the rate of its tensor cores for float32 accumulation."""
    rate = 64 if capability == _TURING else 128
    return GPUSpec(
        key=name.lower().replace(" laptop gpu", " laptop").replace(" ", "-"),
        name=f"NVIDIA GeForce {name}",
        memory_mib=memory_gib * 1024,
        tflops=round(tensor_cores * boost_mhz * rate / 1e6, 1),
        compute_capability=capability,
        source=f"{tensor_cores} tensor cores x {boost_mhz:,} MHz x {rate}, {source}",
    )


def _sized(gpu: GPUSpec) -> GPUSpec:
    """A second memory size under the same name, with the size in its key."""
    return replace(gpu, key=f"{gpu.key}-{gpu.memory_mib // 1024}gb")


# fmt: off
GPUS: tuple[GPUSpec, ...] = (
    # GeForce: name, GiB, tensor cores, boost MHz
    _geforce("RTX 2060", 6, 240, 1680, _TURING, _TURING_PAPER),
    _geforce("RTX 2060 Super", 8, 272, 1650, _TURING, _TURING_PAPER),
    _geforce("RTX 2070", 8, 288, 1620, _TURING, _TURING_PAPER),
    _geforce("RTX 2070 Super", 8, 320, 1770, _TURING, _TURING_PAPER),
    _geforce("RTX 2080", 8, 368, 1710, _TURING, _TURING_PAPER),
    _geforce("RTX 2080 Super", 8, 384, 1815, _TURING, _TURING_PAPER),
    _geforce("RTX 2080 Ti", 11, 544, 1545, _TURING, _TURING_PAPER),
    _geforce("RTX 3050", 8, 80, 1777, _AMPERE, "nvidia.com RTX 3050"),
    _geforce("RTX 3060", 12, 112, 1777, _AMPERE, _MFU_H),
    _geforce("RTX 3060 Ti", 8, 152, 1665, _AMPERE, _MFU_H),
    _geforce("RTX 3070", 8, 184, 1725, _AMPERE, _MFU_H),
    _geforce("RTX 3070 Ti", 8, 192, 1770, _AMPERE, _MFU_H),
    _geforce("RTX 3080", 10, 272, 1710, _AMPERE, _MFU_H),
    _sized(_geforce("RTX 3080", 12, 280, 1710, _AMPERE, "nvidia.com RTX 3080 12GB")),
    _geforce("RTX 3080 Ti", 12, 320, 1665, _AMPERE, _MFU_H),
    _geforce("RTX 3090", 24, 328, 1695, _AMPERE, _MFU_H),
    _geforce("RTX 3090 Ti", 24, 336, 1860, _AMPERE, _MFU_H),
    _geforce("RTX 4060", 8, 96, 2460, _ADA, _MFU_H),
    _geforce("RTX 4060 Ti", 8, 136, 2535, _ADA, _MFU_H),
    _sized(_geforce("RTX 4060 Ti", 16, 136, 2535, _ADA, _MFU_H)),
    _geforce("RTX 4070", 12, 184, 2475, _ADA, _MFU_H),
    _geforce("RTX 4070 Super", 12, 224, 2475, _ADA, _MFU_H),
    _geforce("RTX 4070 Ti", 12, 240, 2610, _ADA, _MFU_H),
    _geforce("RTX 4070 Ti Super", 16, 264, 2610, _ADA, _MFU_H),
    _geforce("RTX 4080", 16, 304, 2505, _ADA, _MFU_H),
    _geforce("RTX 4080 Super", 16, 320, 2550, _ADA, _MFU_H),
    _geforce("RTX 4090 D", 24, 456, 2520, _ADA, "nvidia.cn RTX 4090 D"),
    _geforce("RTX 4090", 24, 512, 2520, _ADA, _MFU_H),
    _geforce("RTX 5050", 8, 80, 2572, _BLACKWELL, "nvidia.com RTX 5050"),
    _geforce("RTX 5060", 8, 120, 2497, _BLACKWELL, "nvidia.com RTX 5060"),
    _geforce("RTX 5060 Ti", 16, 144, 2572, _BLACKWELL, "nvidia.com RTX 5060 Ti"),
    _sized(_geforce("RTX 5060 Ti", 8, 144, 2572, _BLACKWELL, "nvidia.com RTX 5060 Ti")),
    _geforce("RTX 5070", 12, 192, 2512, _BLACKWELL, _BLACKWELL_PAPER),
    _geforce("RTX 5070 Ti", 16, 280, 2452, _BLACKWELL, _BLACKWELL_PAPER),
    _geforce("RTX 5080", 16, 336, 2617, _BLACKWELL, _BLACKWELL_PAPER),
    _geforce("RTX 5090", 32, 680, 2407, _BLACKWELL, _BLACKWELL_PAPER),
    # GeForce in laptops
    _geforce("RTX 3050 Ti Laptop GPU", 4, 80, 1695, _AMPERE, _COMPARE),
    _geforce("RTX 3060 Laptop GPU", 6, 120, 1703, _AMPERE, _COMPARE),
    _geforce("RTX 3070 Laptop GPU", 8, 160, 1620, _AMPERE, _COMPARE),
    _geforce("RTX 3070 Ti Laptop GPU", 8, 184, 1485, _AMPERE, _COMPARE),
    _geforce("RTX 3080 Laptop GPU", 8, 192, 1710, _AMPERE, _COMPARE),
    _sized(_geforce("RTX 3080 Laptop GPU", 16, 192, 1710, _AMPERE, _COMPARE)),
    _geforce("RTX 3080 Ti Laptop GPU", 16, 232, 1590, _AMPERE, _COMPARE),
    _geforce("RTX 4050 Laptop GPU", 6, 80, 2370, _ADA, _COMPARE),
    _geforce("RTX 4060 Laptop GPU", 8, 96, 2370, _ADA, _COMPARE),
    _geforce("RTX 4070 Laptop GPU", 8, 144, 2175, _ADA, _COMPARE),
    _geforce("RTX 4080 Laptop GPU", 12, 232, 2280, _ADA, _COMPARE),
    _geforce("RTX 4090 Laptop GPU", 16, 304, 2040, _ADA, _COMPARE),
    _geforce("RTX 5050 Laptop GPU", 8, 80, 2662, _BLACKWELL, _COMPARE),
    _geforce("RTX 5060 Laptop GPU", 8, 104, 2497, _BLACKWELL, _COMPARE),
    _geforce("RTX 5070 Laptop GPU", 8, 144, 2347, _BLACKWELL, _COMPARE),
    _geforce("RTX 5070 Ti Laptop GPU", 12, 184, 2220, _BLACKWELL, _COMPARE),
    _geforce("RTX 5080 Laptop GPU", 16, 240, 2287, _BLACKWELL, _COMPARE),
    _geforce("RTX 5090 Laptop GPU", 24, 328, 2160, _BLACKWELL, _COMPARE),
    # workstations: key, name, MiB, TFLOP/s
    GPUSpec("titan-rtx", "NVIDIA TITAN RTX", 24_576, 130.5, _TURING, "130.5"),
    GPUSpec("quadro-rtx-5000", "Quadro RTX 5000", 16_384, 89.2, _TURING, "89.2"),
    GPUSpec("quadro-rtx-6000", "Quadro RTX 6000", 24_576, 130.5, _TURING, "130.5"),
    GPUSpec("quadro-rtx-8000", "Quadro RTX 8000", 49_152, 130.5, _TURING, "130.5"),
    GPUSpec("rtx-a2000", "NVIDIA RTX A2000", 6_138, 31.9, _AMPERE, "sparse 63.9"),
    GPUSpec("rtx-a2000-12gb", "NVIDIA RTX A2000 12GB", 12_282, 31.9, _AMPERE, "sparse 63.9"),
    GPUSpec("rtx-a4000", "NVIDIA RTX A4000", 16_376, 76.7, _AMPERE, "sparse 153.4", ("A4000",)),
    GPUSpec("rtx-a4500", "NVIDIA RTX A4500", 20_470, 94.6, _AMPERE, "sparse 189.2", ("A4500",)),
    GPUSpec("rtx-a5000", "NVIDIA RTX A5000", 24_564, 111.1, _AMPERE, "sparse 222.2", ("A5000",)),
    GPUSpec("rtx-a6000", "NVIDIA RTX A6000", 49_140, 154.8, _AMPERE, "sparse 309.7", ("A6000",)),
    GPUSpec("rtx-2000-ada", "NVIDIA RTX 2000 Ada Generation", 16_380, 48.0, _ADA, "fp8 191.9"),
    GPUSpec("rtx-4000-ada", "NVIDIA RTX 4000 Ada Generation", 20_475, 81.9, _ADA, "fp8 327.6"),
    GPUSpec("rtx-4500-ada", "NVIDIA RTX 4500 Ada Generation", 24_570, 158.5, _ADA, "fp8 634"),
    GPUSpec("rtx-5000-ada", "NVIDIA RTX 5000 Ada Generation", 32_760, 261.1, _ADA, "fp8 1,044.4"),
    GPUSpec("rtx-6000-ada", "NVIDIA RTX 6000 Ada Generation", 49_140, 364.2, _ADA, "fp8 1,457"),
    GPUSpec("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97_887, 503.8,
            _BLACKWELL, "fp4 4,000; 752 tensor cores x 2,617 MHz x 256",
            ("RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000 Server")),
    # servers
    GPUSpec("t4", "Tesla T4", 15_360, 65.0, _TURING, "65"),
    GPUSpec("v100", "Tesla V100-SXM2-16GB", 16_160, 125.0, _VOLTA, "125", ("V100 SXM",)),
    GPUSpec("v100-32gb", "Tesla V100-SXM2-32GB", 32_510, 125.0, _VOLTA, "125", ("V100 SXM",)),
    GPUSpec("v100-pcie", "Tesla V100-PCIE-16GB", 16_160, 112.0, _VOLTA, "112"),
    GPUSpec("v100-pcie-32gb", "Tesla V100-PCIE-32GB", 32_510, 112.0, _VOLTA, "112"),
    GPUSpec("a10", "NVIDIA A10", 23_028, 125.0, _AMPERE, "125"),
    GPUSpec("a10g", "NVIDIA A10G", 23_028, 70.0, _AMPERE, "70"),
    GPUSpec("a16", "NVIDIA A16", 15_356, 17.9, _AMPERE, "17.9 per GPU, four on a board"),
    GPUSpec("a30", "NVIDIA A30", 24_576, 165.0, _A100, "165"),
    GPUSpec("a40", "NVIDIA A40", 46_068, 149.7, _AMPERE, "149.7"),
    GPUSpec("a100", "NVIDIA A100-SXM4-40GB", 40_960, 312.0, _A100, "312", ("A100 SXM",)),
    GPUSpec("a100-80gb", "NVIDIA A100-SXM4-80GB", 81_920, 312.0, _A100, "312", ("A100 SXM",)),
    GPUSpec("a100-pcie", "NVIDIA A100-PCIE-40GB", 40_960, 312.0, _A100, "312"),
    GPUSpec("a100-pcie-80gb", "NVIDIA A100 80GB PCIe", 81_920, 312.0, _A100, "312"),
    GPUSpec("l4", "NVIDIA L4", 23_034, 121.0, _ADA, "sparse 242"),
    GPUSpec("l40", "NVIDIA L40", 46_068, 181.0, _ADA, "181.05"),
    GPUSpec("l40s", "NVIDIA L40S", 46_068, 362.0, _ADA, "362.05"),
    GPUSpec("h100", "NVIDIA H100 80GB HBM3", 81_559, 989.4, _HOPPER, "sparse 1,979", ("H100 SXM",)),
    GPUSpec("h100-pcie", "NVIDIA H100 PCIe", 81_559, 756.0, _HOPPER, "sparse 1,513"),
    GPUSpec("h100-nvl", "NVIDIA H100 NVL", 95_830, 835.0, _HOPPER, "sparse 1,671"),
    GPUSpec("h200", "NVIDIA H200", 143_771, 989.4, _HOPPER, "sparse 1,979", ("H200 SXM",)),
    GPUSpec("h200-nvl", "NVIDIA H200 NVL", 143_771, 835.0, _HOPPER, "sparse 1,671"),
    GPUSpec("b200", "NVIDIA B200", 183_359, 2250.0, (10, 0), "sparse 4,500"),
)
# fmt: on
