"""One process of a training group; started by torch's elastic launcher, for
`gpt.training.distributed.launch`.

`python -m gpt.training.distributed.worker TASK`, with TASK a JSON file
(`gpt.training.distributed.launch.WorkerSpec`).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from gpt.errors import GPTError
from gpt.training.checkpoint.retention import write_batch_size
from gpt.training.distributed.ipc import IPCClient
from gpt.training.distributed.launch import GroupStarted, WorkerFailed, WorkerSpec
from gpt.training.distributed.process_group import (
    ProcessGroup,
    join_process_group,
    leave_process_group,
    local_device,
)
from gpt.training.loop import Trainer
from gpt.training.step import SmallerBatchNeeded


def main() -> None:
    task = WorkerSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    speaker = IPCClient()
    hardware = task.config.hardware
    try:
        group = join_process_group(local_device(hardware.device).type, hardware.timeout_seconds)
        _train(task, group, speaker)
    except GPTError as error:
        speaker.send(error)  # no other attempt mends it: it ends the run
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        speaker.send(WorkerFailed(f"{type(error).__name__}: {reason}"))
        raise
    leave_process_group()
    # All is done: threads of gloo's that are still there abort a process that takes itself apart,
    # and the launcher would start the group again.
    logging.shutdown()
    os._exit(0)


def _train(task: WorkerSpec, group: ProcessGroup, speaker: IPCClient) -> None:
    work = group.broadcast_from_main(lambda: task.work)
    assert work, "the leader knows"
    if group.is_main_process:
        logging.getLogger("gpt").addHandler(speaker)
    try:
        trainer = Trainer(task.config, work.dataset, work.folder, speaker.stop_requested, group)
        if group.is_main_process:
            speaker.send(GroupStarted(trainer.step))
        for record in trainer.run():
            if group.is_main_process:
                speaker.send(record)
    except SmallerBatchNeeded as needed:
        write_batch_size(work.folder, needed.batch_size)
        raise


if __name__ == "__main__":
    main()
