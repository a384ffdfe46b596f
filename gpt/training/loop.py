"""The training loop: a generator that yields one record per optimizer step.

It starts from the latest valid checkpoint of the run folder, or from scratch, so re-running the
same call resumes the run. When it is stopped or fails, it leaves a checkpoint of the last complete
step.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.training.checkpoint.retention import latest_valid_checkpoint, read_batch_size
from gpt.training.checkpoint.writer import CheckpointWriter
from gpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from gpt.training.divergence import DivergenceGuard
from gpt.training.metrics import StepMeter, StepRecord
from gpt.training.optimizer import apply_schedule
from gpt.training.out_of_memory import attempt_step, find_batch_size, halve_batch_size
from gpt.training.run_lock import run_lock
from gpt.training.step import TrainState


def never_stop() -> bool:
    return False


def train(
    config: RunConfig,
    dataset: DatasetManifest,
    folder: Path,
    stop: Callable[[], bool] = never_stop,
) -> Iterator[StepRecord]:
    """Train to `training.max_steps`, or until `stop()` returns true, on one device.

    `folder` holds the checkpoints; training resumes from the latest valid one. `stop` is called
    before each micro-batch. A step's record is yielded before its checkpoint is written, the record
    of an evaluation after that, so resuming from a checkpoint loses neither.

    Raises `ConfigError` if the device does not exist, `DatasetError` if a shard fails its check,
    `CheckpointError` if a checkpoint belongs to another run, `OutOfMemoryError` if one sequence
    does not fit into memory, `NonFiniteLossError` if rolling back does not help, and
    `RunLockedError` if another process trains in `folder`.
    """
    with run_lock(folder):
        yield from fit(setup(config, dataset, folder), folder, stop)


def setup(
    config: RunConfig,
    dataset: DatasetManifest,
    folder: Path,
    group: ProcessGroup = SINGLE_PROCESS,
) -> TrainState:
    """Build model, optimizers and data loader, and load the latest valid checkpoint, if any."""
    batch_size = group.broadcast_from_main(
        lambda: read_batch_size(folder) if group.is_distributed else None
    )
    state = TrainState(config, dataset, group, batch_size)
    if checkpoint := group.broadcast_from_main(lambda: latest_valid_checkpoint(folder)):
        state.resume(checkpoint)
    return state


def fit(
    state: TrainState, folder: Path, stop: Callable[[], bool] = never_stop
) -> Iterator[StepRecord]:
    """Train `state` to the last step; every process of a group runs this loop."""
    config, group = state.config, state.group
    if state.step >= config.training.max_steps:
        return
    checkpoints = CheckpointWriter(folder, group, stop)
    divergence = DivergenceGuard(state, checkpoints)
    meter = StepMeter(state)
    # One process must not leave a step that the others wait in.
    stop_within_step = never_stop if group.is_distributed else stop
    with checkpoints.save_on_exit(state):
        find_batch_size(state)
        divergence.exclude_batches()
        while True:
            if _is_due(state, config.training.checkpoint_interval) and not checkpoints.save(state):
                divergence.rollback("weights are not finite")
            if _is_due(state, config.evaluation.interval) and state.step != state.evaluated_step:
                validation = state.evaluate()
                checkpoints.record_best(state, validation.loss)
                yield meter.record_validation(validation)
            checkpoints.wait_while_stalled()
            if state.step >= config.training.max_steps or group.any_process(stop()):
                return

            # One optimizer step.
            start, position = time.perf_counter(), state.loader.position
            learning_rate = apply_schedule(state.optimizers, config, state.step)
            with attempt_step(state) as attempt:
                loss_sum = torch.zeros((), device=state.device)
                for batch, is_last in state.micro_batches():
                    if stop_within_step():
                        attempt.undo()
                        return
                    loss_sum += state.forward_backward(batch, sync_gradients=is_last)
            if attempt.ran_out_of_memory:  # try the same sequences again
                halve_batch_size(state, "in training")
                continue
            loss, grad_norm = state.clip_gradients(loss_sum)
            has_update = math.isfinite(loss) and math.isfinite(grad_norm)
            if has_update:
                state.update_weights()
            else:
                state.skip_update()
            state.step += 1
            is_finite = has_update or (math.isfinite(loss) and state.scale_was_too_large())
            record = meter.record_step(
                learning_rate=learning_rate,
                loss=loss if is_finite else None,
                grad_norm=grad_norm if has_update else None,
                seconds=time.perf_counter() - start,
                recoveries=len(divergence.recoveries),
            )
            divergence.check_divergence(loss, grad_norm, is_finite, position)
            yield record


def _is_due(state: TrainState, interval: int) -> bool:
    return state.step % interval == 0 or state.step == state.config.training.max_steps
