"""Out of memory in training: undo the step and repeat it in smaller micro-batches."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from gpt.errors import OutOfMemoryError, Problem
from gpt.hardware.device import is_out_of_memory, release_memory
from gpt.training.checkpoint.format import get_random_states, set_random_states
from gpt.training.step import TrainState

logger = logging.getLogger(__name__)


class BatchSizeHalved(Exception):  # noqa: N818 - a request to restart, not a fault
    """A process of a group ran out of memory; the group restarts with a smaller micro-batch."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(f"out of memory: restarting with batch_size = {batch_size}")
        self.batch_size = batch_size


@dataclass
class StepAttempt:
    undo: Callable[[], None]
    """Drop the gradients and go back to the data position and random state at the start."""
    ran_out_of_memory: bool = False


@contextmanager
def attempt_step(state: TrainState) -> Iterator[StepAttempt]:
    """Compute the gradients of one step, undone by any error, of which out of memory is
    swallowed."""
    position, random_states = state.loader.position, get_random_states()

    def undo() -> None:
        state.loader.position = position
        state.zero_grad()
        set_random_states(random_states)

    attempt = StepAttempt(undo)
    try:
        yield attempt
    except BaseException as error:
        attempt.ran_out_of_memory = is_out_of_memory(error)
        with suppress(RuntimeError):  # a broken device; `error` says more
            undo()
        if not attempt.ran_out_of_memory:
            raise


def find_batch_size(state: TrainState) -> None:
    """Find the largest micro-batch that fits, before any step counts: try two micro-batches, an
    update and an evaluation, and halve the micro-batch until they fit.

    Leaves weights, optimizer states, random states and data position unchanged.
    """
    has_optimizer_states = any(optimizer.state for optimizer in state.optimizers)
    state.is_consistent = has_optimizer_states
    while True:
        with attempt_step(state) as attempt:
            _run_trial(state, has_optimizer_states)
            attempt.undo()
        if not has_optimizer_states:
            for optimizer in state.optimizers:
                optimizer.state.clear()
        if not attempt.ran_out_of_memory:
            break
        halve_batch_size(state, "in the trial before the first step")
    state.is_consistent = True


def _run_trial(state: TrainState, has_optimizer_states: bool) -> None:
    state.forward_backward(state.loader.next_batch(state.batch_size))
    if not has_optimizer_states:
        _allocate_optimizer_states(state)
    # The second one is at the peak of all later ones: gradients and optimizer states exist.
    state.forward_backward(state.loader.next_batch(state.batch_size))
    state.zero_grad()
    state.evaluate(state.config.evaluation.batch_size * state.config.model.block_size)


def _allocate_optimizer_states(state: TrainState) -> None:
    """Run an update that changes nothing: learning rate 0 and gradients 0."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad.zero_()
        optimizer.step()


def halve_batch_size(state: TrainState, where: str) -> None:
    """Set the largest micro-batch of at most half the size; the tokens of a step stay the same.

    Call it outside the handler of the error, whose traceback keeps the tensors of the step alive.
    Raises `OutOfMemoryError` if the micro-batch is one sequence, and `BatchSizeHalved` in a process
    group, where no process can repeat a step alone.
    """
    release_memory(state.device)
    before, per_step = state.batch_size, state.config.sequences_per_step
    if before == 1:
        raise OutOfMemoryError(
            Problem(
                "training.batch_size",
                "1",
                f"{state.device} ran out of memory {where} with one sequence per micro-batch",
                "set training.activation_checkpointing = true or a smaller "
                "training.loss_chunk_rows, or train a smaller model or model.block_size",
            )
        )
    state.batch_size = next(
        size for size in range(before // 2, 0, -1) if state.sequences_per_process % size == 0
    )
    logger.warning(
        "out of memory %s: batch_size %d -> %d, grad_acc %d -> %d; the tokens of a step and their "
        "order stay the same",
        where,
        before,
        state.batch_size,
        per_step // before,
        per_step // state.batch_size,
    )
    if state.group.is_distributed:
        raise BatchSizeHalved(state.batch_size)
