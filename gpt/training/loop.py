"""The night: a generator that trains and tells of every optimizer step.

It starts from the run folder's latest complete checkpoint or from scratch, so that a retry is a
resume. Within a step nothing waits for the device: a step's numbers are read only after the next
one has been launched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt.artifacts import DatasetManifest
from gpt.config import RunConfig
from gpt.data.batches import Sequences, TrainingBatches
from gpt.evaluation.heldout import HeldoutLoss, heldout_loss
from gpt.model.device import autocast, peak_memory_bytes, pick_device
from gpt.model.loss import summed_loss
from gpt.model.transformer import build_model
from gpt.training.checkpoint import Progress, latest_checkpoint, restore, write_checkpoint
from gpt.training.optimizer import build_optimizers, set_step
from gpt.training.schedule import learning_rate_factor, peak_learning_rates


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did. Step 0 is the evaluation before the first."""

    step: int
    tokens_seen: int
    learning_rate: float
    loss: float | None = None
    """Mean cross-entropy over the step's tokens, nats, before its update."""
    grad_norm: float | None = None
    """Global norm before clipping."""
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    validation: HeldoutLoss | None = None


def train(config: RunConfig, dataset: DatasetManifest, folder: Path) -> Iterator[StepRecord]:
    """Train from where `folder` stands to `training.max_steps`, one record a step.

    Checkpoints are complete before the record of their step is yielded, and written before the
    evaluation of that step. Raises `ConfigError` for a device that is not there, `DatasetError`
    and `CheckpointError` for files that fail their checks.
    """
    return Trainer(config, dataset, folder).run()


class Trainer:
    def __init__(self, config: RunConfig, dataset: DatasetManifest, folder: Path) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        self.device = pick_device(config.hardware.device)
        torch.manual_seed(config.training.seed)
        # Drawn on the CPU, so that every device begins with the same weights.
        self.model = build_model(config.model).to(self.device)
        self.optimizers = build_optimizers(self.model, config)
        sequences = Sequences(dataset, dataset.train, config.model.block_size)
        self.batches = TrainingBatches(sequences, config.training.seed)
        self.step = 0
        checkpoint = latest_checkpoint(folder)
        if checkpoint:
            progress = restore(checkpoint.folder, self.model, self.optimizers)
            self.step, self.batches.position = progress.step, progress.position
        self._last_end = time.perf_counter()

    def run(self) -> Iterator[StepRecord]:
        max_steps = self.config.training.max_steps
        if self.step == 0:
            yield StepRecord(0, 0, self._learning_rate(0), validation=self._validate())
        launched: _LaunchedStep | None = None
        while self.step < max_steps:
            following = self._launch_step()
            if launched:
                yield self._record(launched)
            launched = following
            checkpoint, evaluation = self._due()
            if checkpoint or evaluation:
                record = self._record(launched)
                if checkpoint:
                    self._checkpoint()
                validation = self._validate() if evaluation else None
                yield StepRecord(**{**vars(record), "validation": validation})
                launched = None
                self._last_end = time.perf_counter()

    def _due(self) -> tuple[bool, bool]:
        """Whether the step just launched is followed by a checkpoint, by an evaluation."""
        last = self.step == self.config.training.max_steps
        checkpoint = self.step % self.config.training.checkpoint_interval == 0
        return last or checkpoint, last or self.step % self.config.evaluation.interval == 0

    def _launch_step(self) -> _LaunchedStep:
        """Enqueue one optimizer step; on a GPU this returns before the step is done."""
        training = self.config.training
        set_step(self.optimizers, self.config, self.step)
        rate = self._learning_rate(self.step)
        loss = torch.zeros((), device=self.device)
        for _ in range(training.grad_acc):
            inputs, targets = self._to_device(self.batches.take(training.batch_size))
            with autocast(self.device, training.dtype):
                hidden = self.model(inputs)
                summed = summed_loss(hidden, self.model.head, targets, self.model.logit_softcap)
            # Over the tokens of the whole step, so that micro-batches of any split weigh the same.
            part = summed / self.config.tokens_per_step
            part.backward()
            loss += part.detach()
        limit = self.config.optimizer.grad_clip or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return _LaunchedStep(self.step, rate, loss, grad_norm)

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.device.type == "cpu":
            return batch
        # From pinned memory the copy runs beside the work already enqueued.
        inputs, targets = (part.pin_memory().to(self.device, non_blocking=True) for part in batch)
        return inputs, targets

    def _learning_rate(self, step: int) -> float:
        factor = learning_rate_factor(self.config.schedule, step, self.config.training.max_steps)
        return peak_learning_rates(self.config).matrices * factor

    def _record(self, launched: _LaunchedStep) -> StepRecord:
        loss, grad_norm = launched.wait()
        now = time.perf_counter()
        seconds, self._last_end = now - self._last_end, now
        return StepRecord(
            step=launched.step,
            tokens_seen=launched.step * self.config.tokens_per_step,
            learning_rate=launched.learning_rate,
            loss=loss,
            grad_norm=grad_norm,
            tokens_per_second=self.config.tokens_per_step / seconds,
            peak_memory_bytes=peak_memory_bytes(self.device),
        )

    def _validate(self) -> HeldoutLoss:
        heldout = heldout_loss(self.model, self.config, self.dataset)
        self._last_end = time.perf_counter()
        return heldout

    def _checkpoint(self) -> None:
        progress = Progress(
            step=self.step,
            position=self.batches.position,
            tokens_seen=self.step * self.config.tokens_per_step,
            finished=self.step == self.config.training.max_steps,
        )
        keep = self.config.training.checkpoints_kept
        write_checkpoint(self.folder, self.config, self.model, self.optimizers, progress, keep)


class _LaunchedStep:
    """A step whose numbers may still be on their way from the device."""

    def __init__(self, step: int, learning_rate: float, loss: Tensor, grad_norm: Tensor) -> None:
        self.step, self.learning_rate = step, learning_rate
        numbers = torch.stack((loss, grad_norm.to(loss.dtype)))
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._numbers = numbers

    def wait(self) -> tuple[float, float]:
        """Loss and gradient norm, once the device has come so far."""
        if self._event:
            self._event.synchronize()
        loss, grad_norm = self._numbers.tolist()
        return loss, grad_norm
