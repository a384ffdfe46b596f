"""The night: a generator that trains and tells of every optimizer step.

It starts from the run folder's newest sound checkpoint or from scratch, so that a retry is a
resume. Asked to stop, or thrown out, it leaves a checkpoint of the last whole step. A step whose
numbers are not finite is skipped; where that does not help, the run goes back to a checkpoint and
over the batches that did it (`gpt.training.divergence`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt.artifacts import CheckpointRef, DatasetManifest
from gpt.config.schema import RunConfig
from gpt.errors import NonFiniteLossError, Problem
from gpt.evaluation.heldout import HeldoutLoss
from gpt.hardware.device import peak_memory_bytes, read_energy_joules
from gpt.hardware.flops import flops_per_token
from gpt.hardware.gpus import find_gpu
from gpt.schedule import peak_learning_rates
from gpt.training.checkpoint.format import take_snapshot
from gpt.training.checkpoint.retention import (
    TrainingProgress,
    abandon_latest,
    checkpoint_step,
    complete_checkpoints,
    latest_valid_checkpoint,
    read_batch_size,
    record_best,
    restore_abandoned,
)
from gpt.training.checkpoint.writer import CheckpointWriter
from gpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from gpt.training.divergence import Recovery, SpikeDetector, read_recoveries, write_recoveries
from gpt.training.optimizer import apply_schedule
from gpt.training.run_lock import run_lock
from gpt.training.step import Gradients, Stepper

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did, or with `validation` the evaluation after it, which is told on
    its own. Step 0 is the evaluation before the first."""

    step: int
    tokens_seen: int
    learning_rate: float
    loss: float | None = None
    """Mean cross-entropy over the step's tokens, nats, before its update; None where the step was
    skipped because this or the gradient was not finite."""
    grad_norm: float | None = None
    """Global norm before clipping."""
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Share of the card's peak that `flops_per_token` account for; None where no peak is known."""
    peak_memory_bytes: int | None = None
    batch_size: int | None = None
    """Micro-batch that fitted, sequences: the config's or a part of it."""
    skipped_steps: int | None = None
    """Steps without an update so far."""
    recoveries: int | None = None
    """Returns to a checkpoint so far."""
    energy_joules: float | None = None
    """That the card (of a group, the leader's) used since the record before, evaluations included;
    None where it does not tell."""
    validation: HeldoutLoss | None = None


def never_stop() -> bool:
    return False


def train(
    config: RunConfig,
    dataset: DatasetManifest,
    folder: Path,
    stop: Callable[[], bool] = never_stop,
) -> Iterator[StepRecord]:
    """Train from where `folder` stands to `training.max_steps`, or until `stop` turns true, which
    is asked between micro-batches.

    A step's record comes before its checkpoint is begun, its evaluation after that; so a start
    from that checkpoint has lost neither. Raises `ConfigError` for a device that is not there,
    `DatasetError` for shards that fail their checks, `CheckpointError` for a checkpoint of another
    run, `OutOfMemoryError` when a micro-batch of one sequence is too much, `NonFiniteLossError`
    when going back did not help, `RunLockedError` while another process trains in `folder`.
    """
    with run_lock(folder):
        yield from Trainer(config, dataset, folder, stop).run()


class Trainer:
    def __init__(
        self,
        config: RunConfig,
        dataset: DatasetManifest,
        folder: Path,
        stop: Callable[[], bool] = never_stop,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.config, self.dataset, self.folder, self.stop = config, dataset, folder, stop
        self.group = group
        self.writer = CheckpointWriter(folder)
        fitted = group.broadcast_from_main(lambda: None if group.alone else read_batch_size(folder))
        self.stepper = Stepper(config, dataset, group, fitted)
        self.watch = SpikeDetector(config.training.spike_sigma)
        self.recoveries = group.broadcast_from_main(lambda: read_recoveries(folder))
        self.step = self.saved_step = self.skipped_steps = 0
        self._previous_position = 0
        if checkpoint := self._newest_checkpoint():
            self._load(checkpoint)
        self._flops_share_per_token = self._share_of_peak()
        self._energy_counter = read_energy_joules(self.stepper.device)
        self._last_end = time.perf_counter()

    def _load(self, checkpoint: CheckpointRef | None) -> None:
        """Stand where the checkpoint stood; without one, at the beginning."""
        stepper = self.stepper
        if checkpoint is None:
            progress = stepper.restart(self.dataset.fingerprint)
        else:
            progress = stepper.resume(checkpoint.folder, self.dataset.fingerprint)
        stepper.batches.position = self._previous_position = progress.position
        self.step = self.saved_step = progress.step
        self.skipped_steps = progress.skipped_steps
        self.watch = SpikeDetector(self.config.training.spike_sigma, progress.recent_losses)

    def _newest_checkpoint(self) -> CheckpointRef | None:
        return self.group.broadcast_from_main(lambda: latest_valid_checkpoint(self.folder))

    def _share_of_peak(self) -> float | None:
        """What one token a second is of the peak of the group's cards, all alike; None for a card
        that nobody listed."""
        if not self.stepper.on_gpu:
            return None
        properties = torch.cuda.get_device_properties(self.stepper.device)
        card = find_gpu(properties.name, properties.total_memory)
        peak = card and card.peak_tflops(self.config.training.dtype)
        return flops_per_token(self.config) / (peak * 1e12 * self.group.size) if peak else None

    # --- the run ---------------------------------------------------------------------------------

    def run(self) -> Iterator[StepRecord]:
        try:
            yield from self._steps()
            self._save()
            self._wait_for_disk()
        except NonFiniteLossError:
            raise
        except BaseException:  # an error, a signal, or a consumer that leaves
            self._save_what_can_be()
            raise
        finally:
            self.writer.close()

    def _steps(self) -> Iterator[StepRecord]:
        max_steps = self.config.training.max_steps
        if self.step < max_steps:
            self.stepper.fit()
            self._pass_over()
            if self._evaluation_is_due():  # at the very start, or cut off after its checkpoint
                yield self._validated()
        self._last_end = time.perf_counter()
        while self.step < max_steps:
            if not self.group.alone and self.group.any(self.stop()):
                return
            record = self._take_step()
            if record is None:
                return
            yield record
            if self.step != record.step:  # gone back
                continue
            if self._checkpoint_is_due() and not self._save():
                self._go_back("weights are not finite", self._previous_position)
                continue
            if self._evaluation_is_due():
                yield self._validated()
            while self.group.any(self.writer.stalled and not self.stop()):
                self.writer.pause()

    def _checkpoint_is_due(self) -> bool:
        training = self.config.training
        return self.step % training.checkpoint_interval == 0 or self.step == training.max_steps

    def _evaluation_is_due(self) -> bool:
        last = self.step == self.config.training.max_steps
        return last or self.step % self.config.evaluation.interval == 0

    def _take_step(self) -> StepRecord | None:
        """None where it was stopped before the step was whole."""
        stepper, position = self.stepper, self.stepper.batches.position
        factor = apply_schedule(stepper.optimizers, self.config, self.step)
        gradients = stepper.gradients(self.stop if self.group.alone else never_stop)
        if gradients is None:
            return None
        end, learning_rate = time.perf_counter(), self._peak_learning_rate() * factor
        self.step += 1
        if gradients.usable:
            stepper.update()
        else:
            stepper.drop_gradients()
            self.skipped_steps += 1
        record = self._record(gradients, learning_rate, end)
        previous, self._previous_position = self._previous_position, position
        self._judge(gradients, position, previous)
        return record

    def _judge(self, gradients: Gradients, position: int, previous: int) -> None:
        """Go back where this step shows that it is needed. Its sequences began at `position`, those
        of the step before at `previous`."""
        if gradients.usable:
            if spike := self.watch.taken(gradients.loss):
                self._go_back(spike, position, is_spike=True)
            return
        reason = f"loss {gradients.loss} and gradient norm {gradients.norm} are not both finite"
        logger.warning("step %d is skipped: %s", self.step, reason)
        bad_from = self.watch.skipped(position)
        if not self.stepper.weights_are_finite():  # no batch helps any more
            bad_from = previous
        if bad_from is not None:
            self._go_back(reason, bad_from)

    def _record(self, gradients: Gradients, learning_rate: float, end: float) -> StepRecord:
        tokens_per_second = self.config.tokens_per_step / (end - self._last_end)
        self._last_end = end
        return StepRecord(
            step=self.step,
            tokens_seen=self._tokens_seen,
            learning_rate=learning_rate,
            loss=gradients.loss if gradients.usable else None,
            grad_norm=gradients.norm if gradients.usable else None,
            tokens_per_second=tokens_per_second,
            mfu=self._flops_share_per_token and self._flops_share_per_token * tokens_per_second,
            peak_memory_bytes=peak_memory_bytes(self.stepper.device),
            batch_size=self.stepper.batch_size,
            skipped_steps=self.skipped_steps,
            recoveries=len(self.recoveries),
            energy_joules=self._energy_since_last_time(),
        )

    def _energy_since_last_time(self) -> float | None:
        before, now = self._energy_counter, read_energy_joules(self.stepper.device)
        self._energy_counter = now
        return None if before is None or now is None else now - before

    @property
    def _tokens_seen(self) -> int:
        return self.step * self.config.tokens_per_step

    def _peak_learning_rate(self) -> float:
        return peak_learning_rates(self.config).matrices

    def _validated(self) -> StepRecord:
        """The record of an evaluation; the checkpoint of this step, if it has one, may be the best
        so far."""
        held = self._validate()
        if self.saved_step == self.step > 0:
            self._noted(record_best, self.step, held.loss)
        self._last_end = time.perf_counter()
        return StepRecord(self.step, self._tokens_seen, self._peak_learning_rate(), validation=held)

    def _validate(self) -> HeldoutLoss:
        evaluation = self.config.evaluation
        tokens = min(evaluation.tokens, evaluation.interval_tokens)
        return self.stepper.heldout(self.config, tokens)

    # --- checkpoints -----------------------------------------------------------------------------

    def _save(self, patient: bool = True) -> bool:
        """Begin to write a checkpoint of this step, unless it has one, or the disk has not taken
        the last one yet and there is a stop. False, and nothing written, where weights are not
        finite."""
        if self.step == self.saved_step:
            return True
        if not self.stepper.weights_are_finite():
            return False
        self._wait_for_disk(patient)
        if not self.group.any(self.writer.stalled):
            self._write()
        self._last_end = time.perf_counter()
        return True

    def _wait_for_disk(self, patient: bool = True) -> None:
        """Until the last checkpoint is written; where the disk does not take it, until a stop."""
        while self.group.any(
            self.writer.busy and not (self.writer.stalled and (self.stop() or not patient))
        ):
            self.writer.pause()

    def _save_what_can_be(self) -> None:
        """On the way out of an error, which this must not hide."""
        try:
            # A group that lost one of its own can gather nothing any more.
            if self.stepper.consistent and self.group.alone:
                self._save(patient=False)
        except Exception as error:  # as a device that answers no more
            logger.warning("no checkpoint of step %d could be written: %s", self.step, error)

    def _write(self) -> None:
        stepper = self.stepper
        progress = TrainingProgress(
            step=self.step,
            position=stepper.batches.position,
            tokens_seen=self._tokens_seen,
            finished=self.step == self.config.training.max_steps,
            dataset_fingerprint=self.dataset.fingerprint,
            scaler=stepper.scaler.state_dict(),
            skipped_steps=self.skipped_steps,
            recent_losses=self.watch.losses,
        )
        snapshot = take_snapshot(
            self.config,
            stepper.model,
            stepper.optimizers,
            progress,
            keep=self.group.is_main_process,
        )
        if self.group.is_main_process:
            self.writer.write(snapshot)
        self.saved_step = self.step

    def _noted(self, write: Callable[..., None], *values: Any) -> None:
        """`write` into the run's folder; a disk that does not take it stops nothing."""
        if not self.group.is_main_process:
            return
        try:
            write(self.folder, *values)
        except OSError as error:
            logger.warning("not noted in %s: %s", self.folder, error)

    # --- when numbers went wrong -----------------------------------------------------------------

    def _pass_over(self) -> None:
        self.stepper.batches.exclude_ranges([r.sequences_passed_over for r in self.recoveries])

    def _go_back(self, reason: str, bad_from: int, is_spike: bool = False) -> None:
        """To the newest sound checkpoint, and from the second time in the same place on to the one
        before it; never again to the sequences from `bad_from` on to here.

        Raises `NonFiniteLossError` after `recovery_attempts` in the same place; a spike is lived
        with then.
        """
        self.writer.wait()
        attempts = self.group.broadcast_from_main(self._attempts_here)
        allowed = self.config.training.recovery_attempts
        if attempts >= allowed and is_spike:
            logger.warning("step %d: %s. Going back did not help; going on", self.step, reason)
            self.watch.forget()
            return
        if attempts >= allowed:
            self.group.broadcast_from_main(lambda: restore_abandoned(self.folder))
            raise self._hopeless(reason, attempts)
        if attempts:
            self.group.broadcast_from_main(lambda: abandon_latest(self.folder))
        failed_step, passed_over = self.step, (bad_from, self.stepper.batches.position)
        self.stepper.drop_gradients()
        self._load(self._newest_checkpoint())
        logger.warning(
            "step %d: %s. Going back to step %d and over %d sequences of the data, return %d of %d",
            failed_step,
            reason,
            self.step,
            passed_over[1] - passed_over[0],
            attempts + 1,
            allowed,
        )
        recovery = Recovery(
            step=failed_step,
            back_to_step=self.step,
            reason=reason,
            sequences_passed_over=passed_over,
        )
        self.recoveries = (*self.recoveries, recovery)
        self._noted(write_recoveries, self.recoveries)
        self._pass_over()
        self._last_end = time.perf_counter()

    def _attempts_here(self) -> int:
        """Returns since the newest checkpoint: none of them led to another one."""
        complete = complete_checkpoints(self.folder)
        newest = checkpoint_step(complete[0]) if complete else 0
        return sum(recovery.step > newest for recovery in self.recoveries)

    def _hopeless(self, reason: str, attempts: int) -> NonFiniteLossError:
        complete = complete_checkpoints(self.folder)
        last = f"; the last good checkpoint is {complete[0]}" if complete else ""
        return NonFiniteLossError(
            Problem(
                "training.recovery_attempts",
                str(attempts),
                f"step {self.step}: {reason}, and going back so many times did not help",
                "lower the learning rates (optimizer.learning_rate and its fellows), lengthen "
                "schedule.warmup_steps, set optimizer.grad_clip = 1.0 or training.dtype = "
                f'"float32", or look at the data{last}',
            )
        )
