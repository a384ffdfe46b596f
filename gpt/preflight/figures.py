"""The figures of a valid config: what its run needs of the GPU, of the disk, and in time."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from gpt.config.schema import RunConfig
from gpt.hardware.target_gpu import TargetGPU
from gpt.preflight.data_estimate import DataEstimate, estimate_data
from gpt.preflight.memory import Memory, Sharding, choose_sharding, estimate_memory
from gpt.preflight.parameters import Parameters, count_parameters
from gpt.preflight.scaling import Scaling, estimate_scaling
from gpt.preflight.suggestions import Suggestion, suggest_memory_savings
from gpt.preflight.time import Throughput, estimate_disk, estimate_throughput, free_disk_bytes


@dataclass(frozen=True)
class Figures:
    """The numbers of a config on a GPU."""

    config: RunConfig
    gpu: TargetGPU
    starting: bool
    """Whether a run starts now on this machine; False for a question about it."""
    parameters: Parameters
    sharding: Sharding
    memory: Memory
    """Of one device with `sharding`."""
    throughput: Throughput
    """Of one device."""
    data: DataEstimate
    disk: Mapping[str, int]
    """Bytes to be written, by part."""
    free_disk_bytes: int | None
    scaling: Scaling | None
    """None with one device, or if GPU or throughput are unknown."""

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; None on a CPU and for an unknown GPU."""
        memory_bytes = self.gpu.memory_bytes
        if memory_bytes is None or self.config.hardware.device == "cpu":
            return None
        return self.memory.needed_bytes <= memory_bytes

    @cached_property
    def memory_savings(self) -> list[Suggestion]:
        """Changes with which a run that does not fit would; none if it fits."""
        return suggest_memory_savings(self.config, self.gpu) if self.fits is False else []

    @property
    def is_reduced_at_start(self) -> bool:
        """Whether training reduces the micro-batch until the run fits; it does on one device."""
        one_device = self.config.hardware.world_size == 1
        return self.starting and one_device and bool(self.memory_savings)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices, without overlap of communication and computation."""
        if self.config.hardware.world_size == 1:
            return self.throughput.tokens_per_second
        return self.config.tokens_per_step / self.scaling.step_seconds[1] if self.scaling else None

    @property
    def hours(self) -> float | None:
        """Training time on all devices, without overlap, tokenizing, evaluation, checkpoints."""
        rate = self.tokens_per_second
        return self.config.total_tokens / rate / 3600 if rate else None

    @property
    def hours_range(self) -> tuple[float, float] | None:
        """`hours` within the error of the throughput."""
        rate = self.throughput.tokens_per_second
        if self.hours is None or rate is None:
            return None
        fastest, slowest = self.throughput.fastest, self.throughput.slowest
        return self.hours * rate / fastest, self.hours * rate / slowest

    @property
    def epochs(self) -> float | None:
        tokens = self.data.train_tokens
        return self.config.total_tokens / tokens if tokens else None


def compute_figures(
    config: RunConfig, gpu: TargetGPU, starting: bool, network_gbit: float
) -> Figures:
    """Compute all figures. Raises `ConfigError` for an invalid `network_gbit`."""
    sharding, data = choose_sharding(config, gpu), estimate_data(config)
    throughput = estimate_throughput(config, gpu.spec)
    rate = throughput.tokens_per_second
    return Figures(
        config=config,
        gpu=gpu,
        starting=starting,
        parameters=count_parameters(config.model),
        sharding=sharding,
        memory=estimate_memory(config, sharding, gpu.spec),
        throughput=throughput,
        data=data,
        disk=estimate_disk(config, data),
        free_disk_bytes=free_disk_bytes(config.run.root),
        scaling=estimate_scaling(config, sharding, gpu.spec, rate, network_gbit),
    )
