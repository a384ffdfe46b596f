"""Detect diverging training and roll back to a checkpoint.

A step whose loss or gradient is not finite is skipped. Several skipped steps in a row, weights that
are not finite, or a loss spike roll the run back to a valid checkpoint and exclude the batches in
between, as was done by hand for PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1). A
spike is a loss more than `training.spike_sigma` standard deviations above the mean of the last
`SPIKE_WINDOW` losses: the rule, window and default of OLMo-core's SkipStepOptimizer
(github.com/allenai/OLMo-core), which skips such a step instead of rolling back.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from pydantic import BaseModel, ConfigDict, TypeAdapter

from gpt.errors import NonFiniteLossError, Problem
from gpt.files import write_text
from gpt.training.checkpoint.retention import (
    abandon_latest,
    checkpoint_step,
    complete_checkpoints,
    latest_valid_checkpoint,
    restore_abandoned,
)
from gpt.training.checkpoint.writer import CheckpointWriter
from gpt.training.step import TrainState

logger = logging.getLogger(__name__)

SPIKE_WINDOW = 128
MAX_CONSECUTIVE_SKIPS = 3
RECOVERIES_FILE = "recoveries.json"


class Recovery(BaseModel):
    """One rollback to a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    back_to_step: int
    reason: str
    sequences_passed_over: tuple[int, int]
    """Positions in the training data that are excluded from now on: first, and one after the last.
    """


_RECOVERIES = TypeAdapter(tuple[Recovery, ...])


def read_recoveries(folder: Path) -> tuple[Recovery, ...]:
    """Return the rollbacks of the run in `folder`, oldest first."""
    try:
        return _RECOVERIES.validate_json((folder / RECOVERIES_FILE).read_bytes())
    except FileNotFoundError:
        return ()


def write_recoveries(folder: Path, recoveries: tuple[Recovery, ...]) -> None:
    write_text(folder / RECOVERIES_FILE, _RECOVERIES.dump_json(recoveries, indent=2).decode())


def find_spike(loss: float, last_losses: Sequence[float], sigma: float) -> str | None:
    """Return why `loss` is a spike; None if it is not, or if `sigma` is 0."""
    if sigma and len(last_losses) == SPIKE_WINDOW:
        mean, deviation = fmean(last_losses), stdev(last_losses)
        if loss > mean + sigma * deviation:
            return (
                f"loss {loss:.4f} is a spike: the last {SPIKE_WINDOW} have a mean of {mean:.4f} "
                f"and a standard deviation of {deviation:.4f}"
            )
    return None


class DivergenceGuard:
    """Checks every step of a run, and rolls back when training diverges."""

    def __init__(self, state: TrainState, checkpoints: CheckpointWriter) -> None:
        self._state, self._checkpoints = state, checkpoints
        self._folder, self._group = checkpoints.folder, state.group
        self.recoveries = self._group.broadcast_from_main(lambda: read_recoveries(self._folder))
        self._watch_from_here()

    def _watch_from_here(self) -> None:
        self._consecutive_skips = 0
        self._first_skip = self._last_step = self._state.loader.position

    def exclude_batches(self) -> None:
        """Never train again on the sequences that rollbacks have excluded."""
        excluded = [recovery.sequences_passed_over for recovery in self.recoveries]
        self._state.loader.exclude_ranges(excluded)

    def check_divergence(
        self, loss: float, grad_norm: float, is_finite: bool, position: int
    ) -> None:
        """Check a step whose sequences begin at `position`; roll back if training has diverged.

        Raises `NonFiniteLossError` after `training.recovery_attempts` rollbacks at the same place.
        """
        step_before, self._last_step = self._last_step, position
        if is_finite:
            self._consecutive_skips = 0
            state, sigma = self._state, self._state.config.training.spike_sigma
            if spike := find_spike(loss, state.recent_losses, sigma):
                self.rollback(spike, position, is_spike=True)
            else:
                state.recent_losses = (*state.recent_losses, loss)[-SPIKE_WINDOW:]
            return
        reason = f"loss {loss} and gradient norm {grad_norm} are not both finite"
        logger.warning("step %d is skipped: %s", self._state.step, reason)
        if not self._consecutive_skips:
            self._first_skip = position
        self._consecutive_skips += 1
        if not self._state.weights_are_finite():  # the update before this step was bad
            self.rollback(reason, step_before)
        elif self._consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            self.rollback(reason, self._first_skip)

    def rollback(self, reason: str, first_bad: int | None = None, is_spike: bool = False) -> None:
        """Load the latest valid checkpoint, or the one before it if a rollback to the latest did
        not help, and exclude the sequences from position `first_bad` (default: of the last step).

        A spike that stays after `training.recovery_attempts` rollbacks is accepted. Raises
        `NonFiniteLossError` after that many rollbacks for another reason.
        """
        state, step, folder = self._state, self._state.step, self._folder
        first_bad = self._last_step if first_bad is None else first_bad
        self._checkpoints.wait()
        attempts = self._group.broadcast_from_main(self._count_attempts)
        max_attempts = state.config.training.recovery_attempts
        if attempts >= max_attempts and is_spike:
            logger.warning(
                "step %d: %s. Rolling back did not help; training continues", step, reason
            )
            state.recent_losses = ()
            return
        if attempts >= max_attempts:
            self._group.broadcast_from_main(lambda: restore_abandoned(folder))
            raise self._diverged(reason, attempts)
        if attempts:
            self._group.broadcast_from_main(lambda: abandon_latest(folder))
        excluded = (first_bad, state.loader.position)
        state.zero_grad()
        if checkpoint := self._group.broadcast_from_main(lambda: latest_valid_checkpoint(folder)):
            state.resume(checkpoint)
        else:
            state.restart()
        state.evaluated_step = state.step  # it was evaluated when it was reached first
        self._watch_from_here()
        logger.warning(
            "step %d: %s. Rolling back to step %d and excluding %d sequences of the data, "
            "rollback %d of %d",
            step,
            reason,
            state.step,
            excluded[1] - excluded[0],
            attempts + 1,
            max_attempts,
        )
        self.recoveries += (
            Recovery(
                step=step, back_to_step=state.step, reason=reason, sequences_passed_over=excluded
            ),
        )
        self._checkpoints.try_to_write(write_recoveries, self.recoveries)
        self.exclude_batches()

    def _count_attempts(self) -> int:
        """Count the rollbacks since the latest checkpoint: none of them led to another one."""
        complete = complete_checkpoints(self._folder)
        latest = checkpoint_step(complete[0]) if complete else 0
        return sum(recovery.step > latest for recovery in self.recoveries)

    def _diverged(self, reason: str, attempts: int) -> NonFiniteLossError:
        complete = complete_checkpoints(self._folder)
        last = f"; the last good checkpoint is {complete[0]}" if complete else ""
        return NonFiniteLossError(
            Problem(
                "training.recovery_attempts",
                str(attempts),
                f"step {self._state.step}: {reason}, and {attempts} rollbacks did not help",
                "lower optimizer.learning_rate (and the other learning rates), lengthen "
                "schedule.warmup_steps, set optimizer.grad_clip = 1.0 or training.dtype = "
                f'"float32", or check the data{last}',
            )
        )
