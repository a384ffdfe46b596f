"""Write checkpoints on a thread: training waits only for the copy in memory."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gpt.errors import NonFiniteLossError
from gpt.training.checkpoint.format import Snapshot, take_snapshot, write_checkpoint
from gpt.training.checkpoint.retention import record_best
from gpt.training.distributed.process_group import ProcessGroup
from gpt.training.step import TrainState
from gpt.training.thread_priority import lower_thread_priority

logger = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
"""Pause between attempts while the disk refuses a checkpoint."""
POLL_SECONDS = 0.2
DONE: Future[None] = Future()
DONE.set_result(None)


class CheckpointWriter:
    """Writes the checkpoints of the run in `folder`, one at a time, from the main process.

    While the disk is full or fails, older checkpoints stay, the write is retried, and training
    waits in `wait_while_stalled`, so that no more work is at risk. `stop` ends that wait.
    """

    def __init__(self, folder: Path, group: ProcessGroup, stop: Callable[[], bool]) -> None:
        self.folder = folder
        self._group, self._stop = group, stop
        self._thread = ThreadPoolExecutor(1, "checkpoint-writer", lower_thread_priority)
        self._writing = DONE
        self._closing = threading.Event()
        self._is_stalled = False
        """Whether the disk has refused the checkpoint that is being written."""

    # --- called by the training loop, in every process ------------------------------------------

    def save(self, state: TrainState) -> bool:
        """Start to write a checkpoint of this step, unless it has one already.

        Returns False, and writes nothing, if weights are not finite. Writes nothing either if the
        disk still refuses the last checkpoint when the run is stopped.
        """
        return self._save(state, self._stop)

    def record_best(self, state: TrainState, loss: float) -> None:
        """Note the validation loss of this step, if it has a checkpoint."""
        if state.saved_step == state.step > 0:
            self.try_to_write(record_best, state.step, loss)

    def try_to_write(self, write: Callable[..., None], *values: Any) -> None:
        """Call `write(folder, *values)` in the main process; a disk that refuses is not fatal."""
        if not self._group.is_main_process:
            return
        try:
            write(self.folder, *values)
        except OSError as error:
            logger.warning("a file in %s could not be written: %s", self.folder, error)

    def wait_while_stalled(self) -> None:
        """Wait until the disk accepts the checkpoint, or until a stop."""
        self._wait_while(lambda: self._is_stalled and not self._stop())

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what the writing raised."""
        writing, self._writing = self._writing, DONE
        writing.result()

    @contextmanager
    def save_on_exit(self, state: TrainState) -> Iterator[None]:
        """Save `state` when the block ends or fails, and finish the writing."""
        try:
            yield
            self.save(state)
            self._wait_for_disk(self._stop)
        except NonFiniteLossError:
            raise
        except BaseException:  # an error, a signal, or a consumer that closes the generator
            self._save_after_error(state)
            raise
        finally:
            self._closing.set()
            self._thread.shutdown()
            self.wait()

    def _save(self, state: TrainState, stop: Callable[[], bool]) -> bool:
        if state.step == state.saved_step:
            return True
        if not state.weights_are_finite():
            return False
        self._wait_for_disk(stop)
        if not self._group.any_process(self._is_stalled):
            is_main = self._group.is_main_process
            snapshot = take_snapshot(
                state.config, state.model, state.optimizers, state.progress(), keep=is_main
            )
            if is_main:
                self.wait()
                self._writing = self._thread.submit(self._write, snapshot)
            state.saved_step = state.step
        return True

    def _wait_for_disk(self, stop: Callable[[], bool]) -> None:
        """Wait until the last checkpoint is written; if the disk refuses it, until a stop."""
        self._wait_while(lambda: not self._writing.done() and not (self._is_stalled and stop()))

    def _wait_while(self, condition: Callable[[], bool]) -> None:
        """Wait while `condition` holds in any process."""
        while self._group.any_process(condition()):
            wait([self._writing], POLL_SECONDS)

    def _save_after_error(self, state: TrainState) -> None:
        """Save what can be saved, without hiding the error that is being raised."""
        try:
            # A group that lost a process can gather nothing any more.
            if state.is_consistent and not self._group.is_distributed:
                self._save(state, lambda: True)
        except Exception as error:  # e.g. a device that no longer answers
            logger.warning("no checkpoint of step %d could be written: %s", state.step, error)

    # --- the thread ------------------------------------------------------------------------------

    def _write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint; while the disk refuses it, retry until the run ends."""
        step = snapshot.progress.step
        try:
            while True:
                try:
                    write_checkpoint(self.folder, snapshot)
                    break
                except (OSError, SafetensorError) as error:  # safetensors wraps errors of the disk
                    if not self._is_stalled:
                        logger.warning(
                            "the checkpoint of step %d cannot be written to %s: %s. Training waits "
                            "and retries: free some space, or stop the run, which keeps older "
                            "checkpoints",
                            step,
                            self.folder,
                            error,
                        )
                    self._is_stalled = True
                if self._closing.wait(RETRY_SECONDS):
                    logger.warning("the checkpoint of step %d was not written", step)
                    return
            if self._is_stalled:
                logger.warning("the checkpoint of step %d is written; training continues", step)
        finally:
            self._is_stalled = False
