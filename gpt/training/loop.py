"""The night: a generator that trains and tells of every optimizer step.

It starts from the run folder's latest complete checkpoint or from scratch, so that a retry is a
resume. Within a step nothing waits for the device: a step's numbers are read only after the next
one has been launched. A step that does not fit into memory is done again in smaller micro-batches,
over the same sequences.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt.artifacts import DatasetManifest
from gpt.config import RunConfig
from gpt.data.batches import Batch, Sequences, TrainingBatches
from gpt.errors import OutOfMemoryError, Problem
from gpt.evaluation.heldout import HeldoutLoss, heldout_loss
from gpt.model.compile import compiled
from gpt.model.device import (
    autocast,
    compute_dtype,
    is_out_of_memory,
    peak_memory_bytes,
    pick_device,
)
from gpt.model.loss import summed_loss
from gpt.model.transformer import build_model
from gpt.preflight.cards import find_card
from gpt.preflight.work import flops_per_token
from gpt.training.checkpoint import (
    Progress,
    latest_checkpoint,
    random_states,
    restore,
    set_random_states,
    write_checkpoint,
)
from gpt.training.optimizer import build_optimizers, set_step
from gpt.training.schedule import peak_learning_rates

logger = logging.getLogger(__name__)


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
    mfu: float | None = None
    """Share of the card's peak that `flops_per_token` account for; None where no peak is known."""
    peak_memory_bytes: int | None = None
    batch_size: int | None = None
    """Micro-batch that fitted, sequences: the config's or a part of it."""
    validation: HeldoutLoss | None = None


def train(config: RunConfig, dataset: DatasetManifest, folder: Path) -> Iterator[StepRecord]:
    """Train from where `folder` stands to `training.max_steps`, one record a step.

    Checkpoints are complete before the record of their step is yielded, and written before the
    evaluation of that step. Raises `ConfigError` for a device that is not there, `DatasetError`
    and `CheckpointError` for files that fail their checks, `OutOfMemoryError` when a micro-batch
    of one sequence is too much.
    """
    return Trainer(config, dataset, folder).run()


class Trainer:
    def __init__(self, config: RunConfig, dataset: DatasetManifest, folder: Path) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        self.device = pick_device(config.hardware.device)
        self.batch_size = config.training.batch_size
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where products stay in float32
        torch.manual_seed(config.training.seed)
        # Drawn on the CPU, so that every device begins with the same weights.
        self.model = build_model(config.model).to(self.device)
        self.model.checkpoint_blocks = config.training.activation_checkpointing
        self.network = self._compiled_network()
        self.optimizers = build_optimizers(self.model, config)
        # Gradients in float16 vanish unless scaled; the other types need no scaler.
        scaled = compute_dtype(self.device, config.training.dtype) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        sequences = Sequences(dataset, dataset.train, config.model.block_size)
        self.batches = TrainingBatches(sequences, config.training.seed)
        self.step = 0
        checkpoint = latest_checkpoint(folder)
        if checkpoint:
            progress = restore(checkpoint.folder, self.model, self.optimizers)
            self.step, self.batches.position = progress.step, progress.position
            self.scaler.load_state_dict(progress.scaler)
        self._flops_share_per_token = self._share_of_peak()
        self._last_end = time.perf_counter()

    def _share_of_peak(self) -> float | None:
        """What one token a second is of the card's peak; None for a card that nobody listed."""
        if not self._on_gpu:
            return None
        properties = torch.cuda.get_device_properties(self.device)
        card = find_card(properties.name, properties.total_memory)
        peak = card and card.peak_tflops(self.config.training.dtype)
        return flops_per_token(self.config) / (peak * 1e12) if peak else None

    def _compiled_network(self) -> torch.nn.Module:
        # On a CPU the head dominates small models, and compiling the rest takes longer than it
        # saves in the minutes that a CPU run lasts.
        if self.config.training.compile and self.device.type == "cuda":
            return compiled(self.model, self.device)
        return self.model

    # --- the run ---------------------------------------------------------------------------------

    def run(self) -> Iterator[StepRecord]:
        max_steps = self.config.training.max_steps
        if self.step < max_steps:
            self._fit()
        if self.step == 0:
            yield StepRecord(0, 0, self._peak_learning_rate(), validation=self._validate())
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
                yield dataclasses.replace(record, validation=validation)
                launched = None
                self._last_end = time.perf_counter()

    def _due(self) -> tuple[bool, bool]:
        """Whether the step just launched is followed by a checkpoint, by an evaluation."""
        last = self.step == self.config.training.max_steps
        checkpoint = self.step % self.config.training.checkpoint_interval == 0
        return last or checkpoint, last or self.step % self.config.evaluation.interval == 0

    def _record(self, launched: _LaunchedStep) -> StepRecord:
        loss, grad_norm, end = launched.wait()
        tokens_per_second = self.config.tokens_per_step / (end - self._last_end)
        self._last_end = end
        return StepRecord(
            step=launched.step,
            tokens_seen=launched.step * self.config.tokens_per_step,
            learning_rate=launched.learning_rate,
            loss=loss,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_second,
            mfu=self._flops_share_per_token and self._flops_share_per_token * tokens_per_second,
            peak_memory_bytes=peak_memory_bytes(self.device),
            batch_size=self.batch_size,
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
            scaler=self.scaler.state_dict(),
        )
        keep = self.config.training.checkpoints_kept
        write_checkpoint(self.folder, self.config, self.model, self.optimizers, progress, keep)

    def _peak_learning_rate(self) -> float:
        return peak_learning_rates(self.config).matrices

    # --- one step --------------------------------------------------------------------------------

    def _launch_step(self) -> _LaunchedStep:
        """Enqueue one optimizer step; on a GPU this returns before the step is done."""
        factor = set_step(self.optimizers, self.config, self.step)
        loss = self._accumulate_gradients()
        grad_norm = self._update()
        self.step += 1
        return _LaunchedStep(self.step, self._peak_learning_rate() * factor, loss, grad_norm)

    def _accumulate_gradients(self) -> Tensor:
        """Gradients of the step's mean loss, and that loss; in smaller micro-batches, from the
        step's beginning, where the device runs out of memory."""
        position, random = self.batches.position, random_states()
        while True:
            try:
                grad_acc = self.config.sequences_per_step // self.batch_size
                loss = torch.zeros((), device=self.device)
                for _ in range(grad_acc):
                    loss += self._micro_step(self.batches.take(self.batch_size))
                return loss
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                where = f"at step {self.step + 1}"
            # Outside the handler: its traceback would keep the step's tensors alive.
            self._take_smaller_batches(where)
            self.batches.position = position
            set_random_states(random)

    def _micro_step(self, batch: Batch) -> Tensor:
        """Add the gradients of one micro-batch; its share of the step's mean loss."""
        inputs, targets = (self._to_device(part) for part in batch)
        with autocast(self.device, self.config.training.dtype):
            summed = summed_loss(
                self.network(inputs),
                self.model.head,
                targets,
                self.model.logit_softcap,
                self.config.training.loss_chunk_rows,
                self.config.training.compile,
            )
        # Over the tokens of the whole step, so that micro-batches of any split weigh the same.
        share = summed / self.config.tokens_per_step
        self.scaler.scale(share).backward()
        return share.detach()

    def _update(self) -> Tensor:
        """Clip and step; the gradients' norm before clipping."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.config.optimizer.grad_clip or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return grad_norm

    def _to_device(self, part: Tensor) -> Tensor:
        # From pinned memory the copy runs beside the work that is already enqueued.
        return part.pin_memory().to(self.device, non_blocking=True) if self._on_gpu else part

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    # --- fitting into memory ---------------------------------------------------------------------

    def _fit(self) -> None:
        """Before any work counts: two micro-steps, an update and an evaluation at full size, in
        smaller micro-batches until they fit. Leaves no trace in weights, states or data order."""
        position, random = self.batches.position, random_states()
        while True:
            try:
                self._trial()
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._take_smaller_batches("in the trial before the first step")
        self.batches.position = position
        set_random_states(random)
        self._last_end = time.perf_counter()

    def _trial(self) -> None:
        fresh = not any(optimizer.state for optimizer in self.optimizers)
        self._micro_step(self.batches.take(self.batch_size))
        if fresh:
            self._allocate_optimizer_states()
        # The second stands at the peak of every later one: gradients and optimizer states exist.
        self._micro_step(self.batches.take(self.batch_size))
        self._zero_gradients()
        heldout_loss(self.model, self._one_evaluation_batch(), self.dataset)
        if fresh:
            for optimizer in self.optimizers:
                optimizer.state.clear()

    def _allocate_optimizer_states(self) -> None:
        """An update of nothing: learning rate 0 and gradients 0."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    parameter.grad.zero_()
            optimizer.step()

    def _one_evaluation_batch(self) -> RunConfig:
        tokens = self.config.evaluation.batch_size * self.config.model.block_size
        evaluation = self.config.evaluation.model_copy(update={"tokens": tokens})
        return self.config.model_copy(update={"evaluation": evaluation})

    def _take_smaller_batches(self, where: str) -> None:
        """At most half the micro-batch, the tokens of a step unchanged; raises `OutOfMemoryError`
        when it was one sequence already."""
        self._zero_gradients()
        if self._on_gpu:
            torch.cuda.empty_cache()
        before, total = self.batch_size, self.config.sequences_per_step
        if before == 1:
            raise OutOfMemoryError(
                Problem(
                    "training.batch_size",
                    "1",
                    f"{self.device} ran out of memory {where} with one sequence at a time",
                    "set training.activation_checkpointing = true or a smaller "
                    "training.loss_chunk_rows, or train a smaller model or model.block_size",
                )
            )
        self.batch_size = next(b for b in range(before // 2, 0, -1) if total % b == 0)
        logger.warning(
            "out of memory %s: batch_size %d -> %d, grad_acc %d -> %d; the tokens of a step and "
            "their order stay the same",
            where,
            before,
            self.batch_size,
            total // before,
            total // self.batch_size,
        )

    def _zero_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


class _LaunchedStep:
    """A step whose numbers may still be on their way from the device."""

    def __init__(self, step: int, learning_rate: float, loss: Tensor, grad_norm: Tensor) -> None:
        self.step, self.learning_rate = step, learning_rate
        numbers = torch.stack((loss, grad_norm.to(loss.dtype)))
        self._event: torch.cuda.Event | None = None
        self._end = time.perf_counter()  # on a CPU a launched step is a finished one
        if numbers.device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._numbers = numbers

    def wait(self) -> tuple[float, float, float]:
        """Loss, gradient norm and the time of the step's end, once the device has come so far."""
        if self._event:
            self._event.synchronize()
            self._end = time.perf_counter()
        loss, grad_norm = self._numbers.tolist()
        return loss, grad_norm, self._end
