"""How fast cards talk: to one another in a machine, and over the network between machines.

Speeds are of one direction, at their peak. A maker's NVLink figure counts both directions, so half
of it stands here. PCI Express is its rate x lanes x 128/130, the line code of generation 3 to 5
(PCI-SIG, PCI Express Base Specification). NVLink bridges, which tie two cards together (RTX 3090,
A6000, A100 and H100 PCIe), are not counted: the ring over all cards crosses PCI Express anyway.
GeForce cards since Ada talk through the processor's memory, which takes longer than the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gpt.errors import ConfigError, Problem
from gpt.hardware.gpus import GPUSpec

DEFAULT_NETWORK_GBIT = 25.0
"""What a machine's network is taken for unless told otherwise: 25 Gbit/s Ethernet (IEEE 802.3by),
as AWS's p3.16xlarge with eight V100 has. One port of InfiniBand NDR has 400 (IBTA's roadmap)."""


@dataclass(frozen=True)
class Link:
    """What bytes cross."""

    name: str
    bytes_per_second: float
    """In one direction."""
    source: str


# NVLink: gigabytes a second of both directions together, by the data sheet of the card.
_NVLINK = {
    "v100": (2, 300, "NVIDIA V100 data sheet"),
    "v100-32gb": (2, 300, "NVIDIA V100 data sheet"),
    "a100": (3, 600, "NVIDIA A100 data sheet"),
    "a100-80gb": (3, 600, "NVIDIA A100 data sheet"),
    "h100": (4, 900, "NVIDIA H100 data sheet"),
    "h200": (4, 900, "NVIDIA H200 data sheet"),
    "b200": (5, 1800, "NVIDIA HGX B200 data sheet"),
}
# Gigatransfers a second of a lane, by generation (PCI-SIG).
_PCIE_RATE = {3: 8, 4: 16, 5: 32}
# Lanes where they are not 16 (nvidia.com, specifications of the card; TechPowerUp for GeForce).
_LANES = {
    **dict.fromkeys(("rtx-3050", "rtx-4060", "rtx-4060-ti", "rtx-4060-ti-16gb"), 8),
    **dict.fromkeys(("rtx-5050", "rtx-5060", "rtx-5060-ti", "rtx-5060-ti-8gb"), 8),
    "rtx-2000-ada": 8,
    "a16": 4,  # four cards behind one slot of 16
}


def intra_node_link(card: GPUSpec) -> Link | None:
    """Between the cards of a machine. None for a laptop's: it has no second one."""
    if "Laptop" in card.name:
        return None
    if card.key in _NVLINK:
        generation, both_ways, source = _NVLINK[card.key]
        source = f"{source}, {both_ways} GB/s of both directions"
        return Link(f"NVLink {generation}", both_ways / 2 * 1e9, source)
    generation, lanes = _pcie_generation(card), _LANES.get(card.key, 16)
    speed = _PCIE_RATE[generation] * 1e9 * lanes / 8 * 128 / 130
    source = f"PCI-SIG, {_PCIE_RATE[generation]} GT/s x {lanes} lanes x 128/130"
    return Link(f"PCI Express {generation} x{lanes}", speed, source)


def _pcie_generation(card: GPUSpec) -> int:
    """Volta and Turing 3, Ampere and Ada 4, Hopper and Blackwell 5 (NVIDIA's whitepapers)."""
    if card.compute_capability < (8, 0):
        return 3
    return 4 if card.compute_capability < (9, 0) else 5


def network_link(gbit: float) -> Link:
    """Between machines; `gbit` is what all adapters of one carry together in one direction, 10^9
    bits a second. Raises `ConfigError` for what is no speed."""
    if not (math.isfinite(gbit) and gbit > 0):
        rule, remedy = "must be more than 0 and finite", "give Gbit/s of a machine, as 25 or 400"
        raise ConfigError(Problem("--network-gbit", f"{gbit:g}", rule, remedy))
    source = "as --network-gbit says"
    if gbit == DEFAULT_NETWORK_GBIT:
        source = "assumed unless --network-gbit says otherwise"
    return Link(f"network of {gbit:g} Gbit/s a machine", gbit * 1e9 / 8, source)
