"""Checkpoints written beside the training: a step waits for the copy in memory alone."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from safetensors import SafetensorError

from gpt.training.checkpoint.format import Snapshot, write_checkpoint
from gpt.training.thread_priority import lower_thread_priority

logger = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
"""Pause between attempts while the disk takes no checkpoint."""
POLL_SECONDS = 0.2


class CheckpointWriter:
    """Writes one snapshot at a time on a thread of its own.

    While the disk is full or refuses, the checkpoints before stay as they are, `stalled` is true
    and the write is tried again; whoever trains should wait, so that no more work is at risk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._giving_up = threading.Event()
        self._error: BaseException | None = None
        self.stalled = False

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, snapshot: Snapshot) -> None:
        """Begin; waits for the one before. Raises what that one raised, unless the disk did."""
        self.wait()
        self._thread = threading.Thread(
            target=self._run, args=(snapshot,), name="checkpoint-writer"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises what the writing raised."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def pause(self) -> None:
        """A moment, while the disk does not take the checkpoint."""
        if self._thread:
            self._thread.join(POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Let what is being written become complete; give up where the disk does not take it."""
        self._giving_up.set()
        self.wait()

    def _run(self, snapshot: Snapshot) -> None:
        lower_thread_priority()
        try:
            while not self._tried(snapshot):
                if self._giving_up.wait(RETRY_SECONDS):
                    logger.warning(
                        "the checkpoint of step %d was not written", snapshot.progress.step
                    )
                    return
        except BaseException as error:  # raised again where the run waits for it
            self._error = error
        finally:
            self.stalled = False

    def _tried(self, snapshot: Snapshot) -> bool:
        step = snapshot.progress.step
        try:  # safetensors tells of a disk in an error of its own
            write_checkpoint(self._folder, snapshot)
        except (
            OSError,
            SafetensorError,
        ) as error:
            if not self.stalled:
                logger.warning(
                    "the checkpoint of step %d cannot be written to %s: %s. Training waits and "
                    "tries again; make room there, or stop it and nothing before is lost",
                    step,
                    self._folder,
                    error,
                )
            self.stalled = True
            return False
        if self.stalled:
            logger.warning("the checkpoint of step %d is written; training goes on", step)
        return True
