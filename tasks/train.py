"""Stage 3, train. Called directly, never submitted, so that a signal reaches it."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import CheckpointRef, DatasetManifest
from gpt.config.schema import RunConfig
from gpt.preflight.memory import resolve_sharding
from gpt.training.checkpoint.retention import latest_checkpoint, latest_valid_checkpoint
from gpt.training.distributed.launch import launch_training
from tasks.display import log_info, train_display
from tasks.runtime.signals import stop_signals
from tasks.tracking.runs import RunRef, open_recorder


@task(name="train", task_run_name="train", cache_policy=NO_CACHE)
def train(config: RunConfig, dataset: DatasetManifest, run: RunRef) -> CheckpointRef:
    """Train to the last step, from the latest valid checkpoint if the run folder has one.

    Raises `StopRequested` after writing a checkpoint if a signal asks for it.
    """
    checkpoint = latest_valid_checkpoint(run.folder)
    if checkpoint and checkpoint.finished:
        log_info(
            f"already finished at step {checkpoint.step} in {run.folder}; "
            "to start over, use --fresh or another run.name"
        )
        return checkpoint
    if checkpoint:
        log_info(f"resuming after step {checkpoint.step} in {run.folder}")
    else:
        log_info(f"training in {run.folder}")
    with (
        open_recorder(run) as recorder,
        train_display(config) as show,
        stop_signals.graceful_stop(),
    ):
        for record in launch_training(
            resolve_sharding(config), dataset, run.folder, stop_signals.requested
        ):
            recorder.log_step(record)
            show(record)
    checkpoint = latest_checkpoint(run.folder)
    assert checkpoint, "the last step writes a checkpoint"
    return checkpoint
