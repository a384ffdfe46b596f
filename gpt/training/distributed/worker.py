"""One process of a training group, started by torch's elastic launcher
(`gpt.training.distributed.launch`)."""

import logging
import os
from contextlib import suppress

import torch.distributed as dist

from gpt.errors import GPTError, first_line
from gpt.training.checkpoint.retention import write_batch_size
from gpt.training.distributed.ipc import IPCClient
from gpt.training.distributed.launch import SPEC_FILE, WorkerSpec
from gpt.training.distributed.process_group import (
    ProcessGroup,
    join_process_group,
    local_device,
)
from gpt.training.loop import fit, setup
from gpt.training.out_of_memory import BatchSizeHalved

logger = logging.getLogger("gpt.training.distributed.worker")  # `__name__` is "__main__"


def main() -> None:
    client = IPCClient()
    spec = WorkerSpec.model_validate_json((client.folder / SPEC_FILE).read_bytes())
    hardware = spec.config.hardware
    try:
        group = join_process_group(local_device(hardware.device).type, hardware.timeout_seconds)
        _train(spec, group, client)
    except GPTError as error:
        client.send(error)  # a restart would not help, so it ends the run
    except Exception as error:
        client.send((_restart_count(), f"{type(error).__name__}: {first_line(error)}"))
        raise
    with suppress(RuntimeError):  # the others may have left already
        dist.destroy_process_group()
    # Threads of gloo that still run abort the interpreter's normal exit, and the launcher would
    # restart the group.
    logging.shutdown()
    os._exit(0)


def _train(spec: WorkerSpec, group: ProcessGroup, client: IPCClient) -> None:
    run = group.broadcast_from_main(lambda: spec.run)
    assert run, "the main machine's spec has it"
    hardware = spec.config.hardware.model_copy(update={"sharding": run.sharding})
    config = spec.config.model_copy(update={"hardware": hardware})
    if group.is_main_process:
        logging.getLogger("gpt").addHandler(client)
    try:
        state = setup(config, run.dataset, run.folder, group)
        if group.is_main_process and _restart_count():
            logger.warning("all processes restarted from step %d", state.step)
        for record in fit(state, run.folder, client.stop_requested):
            if group.is_main_process:
                client.send(record)
    except BatchSizeHalved as error:
        write_batch_size(run.folder, error.batch_size)
        raise


def _restart_count() -> int:
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


if __name__ == "__main__":
    main()
