"""Bandwidth between the GPUs of one machine and between machines.

Bandwidths are peaks in one direction. NVIDIA's NVLink figures add both directions, so they are
halved here. PCI Express is transfer rate x lanes x 128/130, the line code of generations 3 to 5
(PCI-SIG, PCI Express Base Specification). NVLink bridges, which connect two GPUs (RTX 3090, A6000,
A100 and H100 PCIe), are not counted: a ring over all GPUs crosses PCI Express anyway. GeForce GPUs
since Ada communicate through the CPU's memory, which is slower than the peak.
"""

import math
from dataclasses import dataclass

from gpt.errors import ConfigError, Problem
from gpt.hardware.gpus import GPUSpec

DEFAULT_NETWORK_GBIT = 25.0
"""25 Gbit/s Ethernet (IEEE 802.3by), as in AWS's p3.16xlarge with eight V100. One port of
InfiniBand NDR has 400 (IBTA's roadmap)."""


@dataclass(frozen=True)
class Link:
    """A connection between GPUs or between machines."""

    name: str
    bytes_per_second: float
    """In one direction."""
    source: str


def intra_node_link(gpu: GPUSpec) -> Link | None:
    """Return the link between the GPUs of one machine. None for laptops, which have one GPU."""
    if gpu.lanes is None:
        return None
    # Volta and Turing have generation 3, Ampere and Ada 4, Hopper and Blackwell 5 (whitepapers).
    major, _ = gpu.compute_capability
    generation = 3 if major < 8 else 4 if major == 8 else 5
    if gpu.nvlink_gbs is not None:
        name = {7: "NVLink 2", 8: "NVLink 3", 9: "NVLink 4"}.get(major, "NVLink 5")
        source = f"NVIDIA's data sheet, {gpu.nvlink_gbs:g} GB/s in both directions together"
        return Link(name, gpu.nvlink_gbs / 2 * 1e9, source)
    # Gigatransfers per second and lane: 8, 16 or 32 (PCI-SIG).
    lanes, rate = gpu.lanes, 2**generation
    source = f"PCI-SIG, {rate} GT/s x {lanes} lanes x 128/130"
    return Link(f"PCI Express {generation} x{lanes}", rate * 1e9 * lanes / 8 * 128 / 130, source)


def network_link(gbit: float) -> Link:
    """Return the link between machines. `gbit`: 10^9 bits per second that all network adapters of
    one machine carry together in one direction. Raises `ConfigError` unless positive and finite."""
    if not (math.isfinite(gbit) and gbit > 0):
        rule, remedy = "must be positive and finite", "give Gbit/s per machine, e.g. 25 or 400"
        raise ConfigError(Problem("--network-gbit", f"{gbit:g}", rule, remedy))
    is_default = gbit == DEFAULT_NETWORK_GBIT
    source = "default of --network-gbit" if is_default else "given by --network-gbit"
    return Link(f"{gbit:g} Gbit/s network", gbit * 1e9 / 8, source)
