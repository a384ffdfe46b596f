"""Bringing MLflow to what a run folder holds: its run with all that belongs to it, then its models.

Sending twice is harmless: MLflow's store ignores a metric that is equal in key, time, step and
value, and a run is found again by its `overnight.uid` before another one is made.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

from tasks.tracking import journal, mlflow_settings
from tasks.tracking.journal import (
    DatasetInput,
    MetricsLine,
    PendingMetadata,
    SyncState,
    require_metadata,
    save_state,
)

mlflow_settings.apply()

from mlflow.entities import (  # noqa: E402
    Dataset,
    InputTag,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.entities import DatasetInput as MlflowDatasetInput  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from tasks.tracking.model_lookup import UID_TAG  # noqa: E402
from tasks.tracking.registry import send_models, send_registration  # noqa: E402

ERROR_TAG = "overnight.error"
NOTE_TAG = "mlflow.note.content"
PARENT_TAG = "mlflow.parentRunId"
TRAINING_EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}
"""What MLflow's own training experiments say of themselves. Its pages open on prompts and traces
all the same (3.17), so that a run's last lines name the page with the curves."""
LINES_A_BATCH = 100
"""At about ten metrics a line this is MLflow's limit of 1,000 metrics a call."""
PARAMETERS_A_BATCH = 100

_delivering = threading.Lock()
"""A courier that was not waited for may still be sending when the next one begins."""


def sync_folder(folder: Path, uri: str) -> None:
    """Bring MLflow to what the run folder holds. Raises what MLflow raises; to be called again."""
    with _delivering:
        client = MlflowClient(tracking_uri=uri)
        outbox = require_metadata(folder)
        receipt = _open(client, outbox, uri, journal.read_sync_state(folder))
        journal.write_sync_state(folder, receipt)
        # The status before the models: a registry that does not work holds up nothing else.
        for send in (
            *(_send_description, _send_tags, _send_metrics, _send_files, _send_status),
            *(send_models, send_registration),
        ):
            receipt = send(client, folder, outbox, receipt)


def _open(
    client: MlflowClient, outbox: PendingMetadata, uri: str, receipt: SyncState | None
) -> SyncState:
    """The run that the receipt names, where it still is; else one found by its uid, else new."""
    if receipt and receipt.uri == uri and _is_active(client, receipt.run_id):
        return receipt
    experiment = _experiment(client, outbox)
    found = client.search_runs([experiment], f"tags.`{UID_TAG}` = '{outbox.uid}'", max_results=1)
    run: Run = (
        found[0]
        if found
        else client.create_run(
            experiment, tags={UID_TAG: outbox.uid} | outbox.tags, run_name=outbox.name
        )
    )
    return SyncState(uri=uri, run_id=run.info.run_id, experiment_id=experiment)


def _is_active(client: MlflowClient, run_id: str) -> bool:
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return False
        raise


def _experiment(client: MlflowClient, outbox: PendingMetadata) -> str:
    experiment = client.get_experiment_by_name(outbox.experiment)
    if experiment:
        return str(experiment.experiment_id)
    location = outbox.artifacts or None
    return str(client.create_experiment(outbox.experiment, location, TRAINING_EXPERIMENT))


def _send_description(
    client: MlflowClient, folder: Path, outbox: PendingMetadata, receipt: SyncState
) -> SyncState:
    """Parameters and data set, once: MLflow takes no change of a parameter."""
    if receipt.described:
        return receipt
    parameters = [Param(key, value) for key, value in outbox.parameters.items()]
    for start in range(0, len(parameters), PARAMETERS_A_BATCH):
        client.log_batch(receipt.run_id, params=parameters[start : start + PARAMETERS_A_BATCH])
    client.log_inputs(receipt.run_id, [_mlflow_dataset(outbox.dataset)])
    return save_state(folder, receipt, described=True)


def _send_tags(
    client: MlflowClient, folder: Path, outbox: PendingMetadata, receipt: SyncState
) -> SyncState:
    above = journal.read_sync_state(outbox.parent) if outbox.parent else None
    wanted = {NOTE_TAG: outbox.note} if outbox.note else {}
    if above and above.uri == receipt.uri:
        wanted[PARENT_TAG] = above.run_id
    for key, value in wanted.items():
        if receipt.tags.get(key) != value:
            client.set_tag(receipt.run_id, key, value)
            receipt = save_state(folder, receipt, tags=receipt.tags | {key: value})
    return receipt


def _mlflow_dataset(dataset: DatasetInput) -> MlflowDatasetInput:
    return MlflowDatasetInput(
        Dataset(
            name=dataset.name,
            digest=dataset.digest,
            source_type="local",
            source=json.dumps({"uri": dataset.sources[0], "sources": dataset.sources}),
            schema=json.dumps(
                {"mlflow_colspec": [{"name": dataset.text_column, "type": "string"}]}
            ),
            profile=json.dumps(dataset.profile),
        ),
        [InputTag("mlflow.data.context", "training")],
    )


def _send_metrics(
    client: MlflowClient, folder: Path, outbox: PendingMetadata, receipt: SyncState
) -> SyncState:
    while True:
        path = folder / journal.METRICS_FILE
        lines, end = journal.read_metrics(path, receipt.sent_bytes, LINES_A_BATCH)
        if not lines:
            return receipt
        client.log_batch(receipt.run_id, [metric for line in lines for metric in _metrics(line)])
        receipt = save_state(folder, receipt, sent_bytes=end)


def _metrics(line: MetricsLine) -> list[Metric]:
    return [Metric(key, value, line.time_ms, line.step) for key, value in line.metrics.items()]


def _send_files(
    client: MlflowClient, folder: Path, outbox: PendingMetadata, receipt: SyncState
) -> SyncState:
    for name, path in outbox.files.items():
        if receipt.files.get(name) == path:
            continue
        parent = str(Path(name).parent)
        client.log_artifact(receipt.run_id, str(path), None if parent == "." else parent)
        receipt = save_state(folder, receipt, files=receipt.files | {name: path})
    return receipt


def _send_status(
    client: MlflowClient, folder: Path, outbox: PendingMetadata, receipt: SyncState
) -> SyncState:
    if receipt.status == outbox.status:
        return receipt
    if outbox.error:
        client.log_batch(receipt.run_id, tags=[RunTag(ERROR_TAG, outbox.error)])
    elif ERROR_TAG in client.get_run(receipt.run_id).data.tags:
        client.delete_tag(receipt.run_id, ERROR_TAG)
    if outbox.status == "RUNNING":
        client.update_run(receipt.run_id, status="RUNNING")
    else:
        client.set_terminated(receipt.run_id, outbox.status)
    return save_state(folder, receipt, status=outbox.status)
