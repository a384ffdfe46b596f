"""Stage 5, register-model: the evaluated model as a version of MLflow's registered model."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.config.schema import RunConfig
from tasks.display import log_info
from tasks.tracking.journal import RegisteredVersion
from tasks.tracking.runs import RunRef, register_last_model


@task(name="register-model", task_run_name="register-model", cache_policy=NO_CACHE)
def register_model(config: RunConfig, run: RunRef) -> RegisteredVersion | None:
    """Register the run's model once, and log whether it is the champion and why.

    Returns None if the config names no registered model, or if MLflow has not answered.
    """
    name = config.tracking.registered_model
    version = register_last_model(run, name)
    if version:
        log_info(f"registered as {version}")
    elif name:
        log_info(f"not registered as {name} yet: MLflow at {run.uri} has not answered")
    return version
