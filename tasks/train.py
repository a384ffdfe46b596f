"""Stage 3, train: the night. Called directly, never submitted, so that a signal reaches it."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import CheckpointRef, DatasetManifest
from gpt.config.schema import RunConfig
from gpt.training.checkpoint.retention import latest_checkpoint, sound_checkpoint
from gpt.training.distributed.launch import train_on_all
from tasks.display import tell, train_display
from tasks.runtime.signals import stopping
from tasks.tracking.runs import RunRef, recording


@task(name="train", task_run_name="train", cache_policy=NO_CACHE)
def train(config: RunConfig, dataset: DatasetManifest, run: RunRef) -> CheckpointRef:
    """Train to the config's last step, from the run folder's newest sound checkpoint if it has one.

    Raises `StopRequested` after a checkpoint when a signal asks for it.
    """
    checkpoint = sound_checkpoint(run.folder)
    if checkpoint and checkpoint.finished:
        tell(
            f"already finished at step {checkpoint.step} in {run.folder}; "
            "start anew with --fresh or another run.name"
        )
        return checkpoint
    if checkpoint:
        tell(f"going on after step {checkpoint.step} in {run.folder}")
    else:
        tell(f"training in {run.folder}")
    with recording(run) as recorder, train_display(config) as display, stopping.gracefully():
        for record in train_on_all(config, dataset, run.folder, stopping.requested):
            recorder.step(record)
            display.show(record)
    checkpoint = latest_checkpoint(run.folder)
    assert checkpoint, "the last step writes a checkpoint"
    return checkpoint
