"""Training on several devices: bytes sent, time per step, and when the network is the bottleneck.

N devices share a step's micro-batches, m each. Gradients are float32 and reduced once per step,
after the last micro-batch. With ring algorithms each device sends per step (Patarasuk and Yuan
2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"):

- ddp: an all-reduce of the gradients, 2 (N - 1) / N of their bytes;
- fsdp: a reduce-scatter of the gradients, (N - 1) / N of their bytes; and per micro-batch an
  all-gather of the blocks' weights twice, for forward and backward, and of the other weights once,
  because they stay gathered (the defaults of torch's fully_shard over all devices; Rajbhandari et
  al. 2020, "ZeRO", arXiv:1910.02054, counts likewise). Weights are gathered in float32.

A ring is as fast as its slowest link: within one machine that of the GPUs; with several machines
the slower of that and a machine's network, which the ring enters and leaves once. Latency, which
grows with the ring, is not counted.

Communication overlaps with computation. Two bounds are given. No overlap: the times add up. Full
overlap: gradients overlap with the backward pass of the last micro-batch, two thirds of its FLOPs;
with fsdp, what a micro-batch gathers (and in the last one the gradients too) overlaps with that
micro-batch. The network is the bottleneck if a device waits even then.
"""

from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from typing import Any

from gpt.config.schema import RunConfig
from gpt.hardware.gpus import GPUSpec
from gpt.hardware.interconnect import Link, intra_node_link, network_link
from gpt.preflight.memory import Sharding
from gpt.preflight.parameters import Parameters, count_parameters

BACKWARD_SHARE = 2 / 3
BYTES_PER_VALUE = 4
"""Of weights and gradients."""
MAX_NODES = 65_536
"""Upper limit of hardware.nodes."""
BASIS = (
    "computed from the throughput of one device and the peak bandwidth of the links, without "
    "latency: real communication takes longer"
)


@dataclass(frozen=True)
class Scaling:
    """A run on several devices. Bytes and seconds are per device and optimizer step."""

    devices: int
    """Per machine."""
    nodes: int
    sharding: Sharding
    parameters: Parameters
    micro_batches: int
    micro_batch_seconds: float
    """Forward and backward."""
    intra_node: Link
    network: Link

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes

    @property
    def link(self) -> Link:
        """The slowest link of the ring."""
        if self.nodes == 1:
            return self.intra_node
        if self.devices == 1:
            return self.network
        return min(self.intra_node, self.network, key=lambda link: link.bytes_per_second)

    @property
    def _ring_bytes(self) -> float:
        """Bytes sent per parameter when a ring passes it on once."""
        return (self.world_size - 1) / self.world_size * BYTES_PER_VALUE

    @property
    def gathered_bytes(self) -> float:
        """Weights sent per micro-batch."""
        if self.sharding == "ddp":
            return 0.0
        return self._ring_bytes * (self.parameters.total + self.parameters.in_blocks)

    @property
    def gradient_bytes(self) -> float:
        passes = 2 if self.sharding == "ddp" else 1
        return passes * self._ring_bytes * self.parameters.total

    @property
    def sent_bytes(self) -> float:
        return self.micro_batches * self.gathered_bytes + self.gradient_bytes

    @property
    def compute_seconds(self) -> float:
        return self.micro_batches * self.micro_batch_seconds

    @property
    def communication_seconds(self) -> float:
        return self.sent_bytes / self.link.bytes_per_second

    @property
    def overlap_seconds(self) -> float:
        """Computation that the communication after the last micro-batch can overlap with."""
        return (BACKWARD_SHARE if self.sharding == "ddp" else 1) * self.micro_batch_seconds

    @property
    def wait_seconds(self) -> float:
        """Time that a device waits with full overlap."""
        gathering = self.gathered_bytes / self.link.bytes_per_second
        last = gathering + self.gradient_bytes / self.link.bytes_per_second
        before = (self.micro_batches - 1) * max(0.0, gathering - self.micro_batch_seconds)
        return before + max(0.0, last - self.overlap_seconds)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """With full overlap and with none."""
        compute = self.compute_seconds
        return compute + self.wait_seconds, compute + self.communication_seconds

    @property
    def efficiency(self) -> tuple[float, float]:
        """Throughput as a share of `world_size` times one device: full overlap, none."""
        full, none = self.step_seconds
        return self.compute_seconds / full, self.compute_seconds / none

    def hours(self, steps: int) -> tuple[float, float]:
        """With full overlap and with none."""
        full, none = self.step_seconds
        return steps * full / 3600, steps * none / 3600

    @property
    def is_network_bound(self) -> bool:
        return self.wait_seconds > 0

    @property
    def needed_factor(self) -> float:
        """Factor by which a micro-batch must be larger, or the link faster, to avoid waiting."""
        last = self.gathered_bytes + self.gradient_bytes
        return last / self.link.bytes_per_second / self.overlap_seconds

    @property
    def network_bound_from(self) -> tuple[int, int] | None:
        """The fewest (devices per machine, machines) at which this micro-batch is network-bound:
        more devices in one machine up to `devices`, then more machines. None: at no number."""

        def place(count: int) -> tuple[int, int]:
            return min(count, self.devices), max(1, count - self.devices + 1)

        def is_bound(count: int) -> bool:
            devices, nodes = place(count)
            return replace(self, devices=devices, nodes=nodes).is_network_bound

        # A larger ring only takes longer: its link is never faster.
        counts = range(2, self.devices + MAX_NODES)
        first = bisect_left(counts, True, key=is_bound)
        return place(counts[first]) if first < len(counts) else None

    def as_json(self, steps: int) -> dict[str, Any]:
        bound_from = self.network_bound_from
        return {
            "devices": self.devices,
            "nodes": self.nodes,
            "sharding": self.sharding,
            "micro_batches_each": self.micro_batches,
            "sent_bytes_each": round(self.sent_bytes),
            "gradient_bytes_each": round(self.gradient_bytes),
            "gathered_bytes_each": round(self.micro_batches * self.gathered_bytes),
            "link": asdict(self.link),
            "inside": asdict(self.intra_node),
            "between": asdict(self.network) if self.nodes > 1 else None,
            "compute_seconds": self.compute_seconds,
            "exchange_seconds": self.communication_seconds,
            "hiding_seconds": self.overlap_seconds,
            "step_seconds": _bounds(self.step_seconds),
            "efficiency": _bounds(self.efficiency),
            "hours": _bounds(self.hours(steps)),
            "binds": self.is_network_bound,
            "binds_from": bound_from and {"devices": bound_from[0], "nodes": bound_from[1]},
            "needed_factor": self.needed_factor,
            "basis": BASIS,
        }


def _bounds(full_and_no_overlap: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("hidden", "exposed"), full_and_no_overlap, strict=True))


def estimate_scaling(
    config: RunConfig,
    sharding: Sharding,
    gpu: GPUSpec | None,
    tokens_per_second: float | None,
    network_gbit: float,
) -> Scaling | None:
    """Estimate a run on its devices. None with one device, or if GPU or throughput are unknown.

    `tokens_per_second`: of one device. Raises `ConfigError` for an invalid `network_gbit`.
    """
    hardware, training = config.hardware, config.training
    network = network_link(network_gbit)
    intra_node = intra_node_link(gpu) if gpu else None
    if hardware.world_size == 1 or intra_node is None or tokens_per_second is None:
        return None
    return Scaling(
        devices=hardware.devices,
        nodes=hardware.nodes,
        sharding=sharding,
        parameters=count_parameters(config.model),
        micro_batches=training.grad_acc // hardware.world_size,
        micro_batch_seconds=training.batch_size * config.model.block_size / tokens_per_second,
        intra_node=intra_node,
        network=network,
    )
