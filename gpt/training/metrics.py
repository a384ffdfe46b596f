"""The record of a step: loss, throughput, model FLOPs utilization, memory and energy."""

from dataclasses import dataclass

import torch

from gpt.artifacts import HeldoutLoss
from gpt.hardware.device import peak_memory_bytes, read_energy_joules
from gpt.hardware.gpus import find_gpu
from gpt.schedule import peak_learning_rates
from gpt.training.step import TrainState


@dataclass(frozen=True)
class StepRecord:
    """The numbers of one optimizer step, or of the evaluation after it if `validation` is set.

    Step 0 is the evaluation before the first step.
    """

    step: int
    tokens_seen: int
    learning_rate: float
    loss: float | None = None
    """Mean cross-entropy over the tokens of the step before its update, in nats; None if the update
    was skipped because loss or gradient was not finite."""
    grad_norm: float | None = None
    """Global norm before clipping; None also if a float16 gradient overflowed."""
    tokens_per_second: float | None = None
    """Of the step alone: checkpoints and evaluations are not counted."""
    mfu: float | None = None
    """Share of the GPU's peak FLOP/s that the model's FLOPs take; None if the peak is unknown."""
    peak_memory_bytes: int | None = None
    batch_size: int | None = None
    """Micro-batch in sequences: the configured one, or the part of it that fits into memory."""
    skipped_steps: int | None = None
    """Steps without an update so far."""
    recoveries: int | None = None
    """Rollbacks to a checkpoint so far."""
    energy_joules: float | None = None
    """Energy the GPU (of a group, the main process's) used since the last step's record; None if
    the GPU does not report it."""
    validation: HeldoutLoss | None = None


class StepMeter:
    """Measures the steps of a run."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._peak_flops = _peak_flops_per_second(state)
        self._energy_joules = read_energy_joules(state.device)

    def record_step(
        self,
        learning_rate: float,
        loss: float | None,
        grad_norm: float | None,
        seconds: float,
        recoveries: int,
    ) -> StepRecord:
        """Return the record of the step that `state` has just done in `seconds`."""
        state = self._state
        tokens_per_second = state.config.tokens_per_step / seconds
        flops_per_second = state.config.flops_per_token * tokens_per_second
        return StepRecord(
            step=state.step,
            tokens_seen=state.tokens_seen,
            learning_rate=learning_rate,
            loss=loss,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_second,
            mfu=flops_per_second / self._peak_flops if self._peak_flops else None,
            peak_memory_bytes=peak_memory_bytes(state.device),
            batch_size=state.batch_size,
            skipped_steps=state.skipped_steps,
            recoveries=recoveries,
            energy_joules=self._energy_since_last_record(),
        )

    def record_validation(self, validation: HeldoutLoss) -> StepRecord:
        """Return the record of an evaluation."""
        state, peak = self._state, peak_learning_rates(self._state.config).matrices
        return StepRecord(state.step, state.tokens_seen, peak, validation=validation)

    def _energy_since_last_record(self) -> float | None:
        before, now = self._energy_joules, read_energy_joules(self._state.device)
        self._energy_joules = now
        return None if before is None or now is None else now - before


def _peak_flops_per_second(state: TrainState) -> float | None:
    """Return the peak of all GPUs of the group, which are assumed alike; None if it is unknown."""
    if not state.on_gpu:
        return None
    properties = torch.cuda.get_device_properties(state.device)
    gpu = find_gpu(properties.name, properties.total_memory)
    peak_tflops = gpu and gpu.peak_tflops(state.config.training.dtype)
    return peak_tflops * 1e12 * state.group.world_size if peak_tflops else None
