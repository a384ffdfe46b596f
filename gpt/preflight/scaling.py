"""What many devices cost: bytes that they exchange, the time of a step, and where the links bind.

The devices share out a step's micro-batches, m each, N devices in all. Gradients are in float32 and
exchanged once a step, after the last micro-batch. Rings send from each device, a step
(Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"):

- ddp: an all-reduce of the gradients, 2 (N - 1) / N of their bytes;
- fsdp: (N - 1) / N of the gradients' bytes, a reduce-scatter, and for every micro-batch as much of
  the blocks' weights twice, for forward and for backward, and of the other weights once, which stay
  gathered (torch's fully_shard by its defaults, over all devices; Rajbhandari et al. 2020, "ZeRO",
  arXiv:1910.02054, counts likewise). Weights are gathered in float32, as they are kept.

A ring goes at the pace of its slowest link: inside one machine that of the cards, over several the
slower of that and a machine's network, which the ring enters and leaves once. Latency is not
counted; it grows with the ring.

What a device computes meanwhile hides the exchange. Two bounds are given. Nothing hidden: the times
add up. All hidden that can be: gradients behind the backward pass of the last micro-batch, two
thirds of its operations (`gpt.preflight.time`); with fsdp whatever a micro-batch gathers, and
gradients too, behind that micro-batch. The links bind where, even so, a device waits.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from typing import Any

from gpt.config.schema import RunConfig
from gpt.hardware.gpus import GPUSpec
from gpt.hardware.interconnect import Link, intra_node_link, network_link
from gpt.preflight.layout import Layout
from gpt.preflight.parameters import Parameters, count_parameters

BACKWARD_SHARE = 2 / 3
GRADIENT_BYTES = 4
WEIGHT_BYTES = 4
MOST_NODES = 65_536
"""As many as hardware.nodes may be."""
BASIS = (
    "computed from the pace of one device and the links' peak speeds, latency not counted: real "
    "exchanges take longer"
)


@dataclass(frozen=True)
class Exchange:
    """What each device computes and sends."""

    layout: Layout
    parameters: Parameters
    micro_batches: int
    """Of one device, a step."""
    micro_batch_seconds: float
    """Forward and backward."""
    link: Link
    """The slowest that the ring crosses."""

    @property
    def _part(self) -> float:
        """What of something a ring sends from each device once around."""
        return (self.layout.devices - 1) / self.layout.devices

    @property
    def gathered_bytes(self) -> float:
        """Weights that a device sends for one micro-batch."""
        if not self.layout.shares:
            return 0.0
        twice = self.parameters.total + self.parameters.in_blocks
        return self._part * WEIGHT_BYTES * twice

    @property
    def gradient_bytes(self) -> float:
        """Sent by each device, a step."""
        times = 1 if self.layout.shares else 2
        return times * self._part * GRADIENT_BYTES * self.parameters.total

    @property
    def sent_bytes(self) -> float:
        """By each device, a step."""
        return self.micro_batches * self.gathered_bytes + self.gradient_bytes

    @property
    def compute_seconds(self) -> float:
        return self.micro_batches * self.micro_batch_seconds

    @property
    def exchange_seconds(self) -> float:
        return self.sent_bytes / self.link.bytes_per_second

    @property
    def hiding_seconds(self) -> float:
        """What the exchange after the last micro-batch can hide behind."""
        return (1 if self.layout.shares else BACKWARD_SHARE) * self.micro_batch_seconds

    @property
    def waited_seconds(self) -> float:
        """A step, where all is hidden that can be."""
        gathering = self.gathered_bytes / self.link.bytes_per_second
        last = gathering + self.gradient_bytes / self.link.bytes_per_second
        before = (self.micro_batches - 1) * max(0.0, gathering - self.micro_batch_seconds)
        return before + max(0.0, last - self.hiding_seconds)

    @property
    def binds(self) -> bool:
        return self.waited_seconds > 0

    @property
    def needed_factor(self) -> float:
        """By how much a micro-batch must be longer, or the link faster, so that nobody waits."""
        last = self.gathered_bytes + self.gradient_bytes
        return last / self.link.bytes_per_second / self.hiding_seconds


@dataclass(frozen=True)
class Scaling:
    """A run on many devices. Seconds are of one optimizer step."""

    devices: int
    """Of each machine."""
    nodes: int
    sharding: str
    micro_batches: int
    exchange: Exchange
    inside: Link
    between: Link | None
    """None with one machine."""
    step_seconds_hidden: float
    step_seconds_exposed: float
    binds_from: tuple[int, int] | None
    """Fewest (devices of a machine, machines) with which the links bind at this micro-batch; None:
    they do not, however many machines of this kind there are."""

    @property
    def world(self) -> int:
        return self.devices * self.nodes

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of as many times the pace of one device, with nothing hidden and with all."""
        seconds = self.exchange.compute_seconds
        return seconds / self.step_seconds_exposed, seconds / self.step_seconds_hidden

    def hours(self, steps: int) -> tuple[float, float]:
        """Of `steps`, with all hidden and with nothing."""
        return (
            steps * self.step_seconds_hidden / 3600,
            steps * self.step_seconds_exposed / 3600,
        )

    def as_json(self, steps: int) -> dict[str, Any]:
        exchange, (low, high), hours = self.exchange, self.efficiency, self.hours(steps)
        return {
            "devices": self.devices,
            "nodes": self.nodes,
            "sharding": self.sharding,
            "micro_batches_each": self.micro_batches,
            "sent_bytes_each": round(exchange.sent_bytes),
            "gradient_bytes_each": round(exchange.gradient_bytes),
            "gathered_bytes_each": round(exchange.micro_batches * exchange.gathered_bytes),
            "link": asdict(exchange.link),
            "inside": asdict(self.inside),
            "between": asdict(self.between) if self.between else None,
            "compute_seconds": exchange.compute_seconds,
            "exchange_seconds": exchange.exchange_seconds,
            "hiding_seconds": exchange.hiding_seconds,
            "step_seconds": {
                "hidden": self.step_seconds_hidden,
                "exposed": self.step_seconds_exposed,
            },
            "efficiency": {"hidden": high, "exposed": low},
            "hours": {"hidden": hours[0], "exposed": hours[1]},
            "binds": exchange.binds,
            "binds_from": self.binds_from
            and {"devices": self.binds_from[0], "nodes": self.binds_from[1]},
            "needed_factor": exchange.needed_factor,
            "basis": BASIS,
        }


def estimate_scaling(
    config: RunConfig,
    layout: Layout,
    card: GPUSpec | None,
    tokens_per_second: float | None,
    network_gbit: float,
) -> Scaling | None:
    """The run on its devices; None with one, and where card or pace are not known: nobody guesses.

    `tokens_per_second`: of one device. Raises `ConfigError` for a network of no speed.
    """
    hardware, training = config.hardware, config.training
    wire = network_link(network_gbit)
    inside = intra_node_link(card) if card else None
    if layout.devices == 1 or inside is None or tokens_per_second is None:
        return None
    exchange = Exchange(
        layout=layout,
        parameters=count_parameters(config.model),
        micro_batches=training.grad_acc // layout.devices,
        micro_batch_seconds=training.batch_size * config.model.block_size / tokens_per_second,
        link=_slowest(inside, wire, hardware.devices, hardware.nodes),
    )
    seconds = exchange.compute_seconds
    return Scaling(
        devices=hardware.devices,
        nodes=hardware.nodes,
        sharding=layout.sharding,
        micro_batches=exchange.micro_batches,
        exchange=exchange,
        inside=inside,
        between=wire if hardware.nodes > 1 else None,
        step_seconds_hidden=seconds + exchange.waited_seconds,
        step_seconds_exposed=seconds + exchange.exchange_seconds,
        binds_from=_binds_from(exchange, inside, wire, hardware.devices),
    )


def _slowest(inside: Link, wire: Link, devices: int, nodes: int) -> Link:
    if nodes == 1:
        return inside
    if devices == 1:
        return wire
    return min(inside, wire, key=lambda link: link.bytes_per_second)


def _binds_from(
    exchange: Exchange, inside: Link, wire: Link, devices: int
) -> tuple[int, int] | None:
    """More devices in a machine, up to those there are, then more machines of as many."""

    def binds(count: int, nodes: int) -> bool:
        layout = replace(exchange.layout, devices=count * nodes)
        link = _slowest(inside, wire, count, nodes)
        return replace(exchange, layout=layout, link=link).binds

    for count in range(2, devices + 1):
        if binds(count, 1):
            return count, 1
    # Over the same link a larger ring only takes longer.
    several = range(2, MOST_NODES + 1)
    place = bisect_left(several, True, key=lambda nodes: binds(devices, nodes))
    return (devices, several[place]) if place < len(several) else None
