"""Sending a run folder to MLflow: parameters, dataset, tags, metrics, files and status.

Sending twice is harmless: MLflow's store ignores a metric that is equal in key, time, step and
value, and a run is found by its `overnight.uid` before a new one is created.
"""

import json
from pathlib import Path
from typing import Any

from tasks.tracking import journal
from tasks.tracking.journal import DatasetInfo, SyncState
from tasks.tracking.mlflow_api import MlflowClient, Tag, entities, get_or_none

TRAINING_EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}
"""How MLflow marks training experiments. Its UI (3.17) opens on prompts and traces all the same,
so a run prints the address of the page with the curves."""
LINES_PER_BATCH = 100
"""Lines of the journal that are sent before the progress is saved."""
MAX_TAG_LENGTH = 5_000
"""MLflow's limit, in characters."""


class RunSync:
    """One pass that brings MLflow up to date with a run folder. Every method raises what MLflow
    raises, and the next pass continues where it stopped."""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder = folder
        self.client = MlflowClient(tracking_uri=uri)
        self.metadata = journal.update_metadata(folder)
        self.state = self._open_mlflow_run(uri, journal.read_sync_state(folder, uri))
        self.save()

    def save(self, **changes: Any) -> None:
        """Write down what MLflow has received."""
        self.state = journal.save_state(self.folder, self.state, **changes)

    def _open_mlflow_run(self, uri: str, state: SyncState | None) -> SyncState:
        """Return the known run if it still exists, else find it by its uid, else create it."""
        client, metadata = self.client, self.metadata
        if state:
            known = get_or_none(lambda: client.get_run(state.run_id))
            if known and known.info.lifecycle_stage == "active":
                return state
        if found := client.get_experiment_by_name(metadata.experiment):
            experiment = str(found.experiment_id)
        else:
            location = metadata.artifacts or None
            experiment = client.create_experiment(
                metadata.experiment, location, TRAINING_EXPERIMENT
            )
        query, tags = f"tags.`{Tag.UID}` = '{metadata.uid}'", {Tag.UID: metadata.uid}
        runs = client.search_runs([experiment], query, max_results=1) or [
            client.create_run(experiment, tags=tags | metadata.tags, run_name=metadata.name)
        ]
        return SyncState(uri=uri, run_id=runs[0].info.run_id, experiment_id=experiment)

    def send_parameters(self) -> None:
        """Send parameters and dataset, once: MLflow does not allow a parameter to change."""
        if not self.state.described:
            parameters = [entities.Param(*item) for item in self.metadata.parameters.items()]
            self.client.log_batch(self.state.run_id, params=parameters)
            self.client.log_inputs(self.state.run_id, [_to_mlflow_dataset(self.metadata.dataset)])
            self.save(described=True)

    def send_tags(self) -> None:
        """Send the description of the run and its parent, if they have changed."""
        folder = self.metadata.parent
        parent = journal.read_sync_state(folder, self.state.uri) if folder else None
        tags = {Tag.NOTE: self.metadata.note} if self.metadata.note else {}
        if parent:
            tags[Tag.PARENT_RUN] = parent.run_id
        if not tags.items() <= self.state.tags.items():
            changed = [entities.RunTag(*item) for item in tags.items()]
            self.client.log_batch(self.state.run_id, tags=changed)
            self.save(tags=self.state.tags | tags)

    def send_metrics(self) -> None:
        """Send the new lines of `metrics.jsonl`."""
        path = self.folder / journal.METRICS_FILE
        while True:
            lines, end = journal.read_metrics(path, self.state.sent_bytes, LINES_PER_BATCH)
            if not lines:
                return
            metrics = [
                entities.Metric(key, value, line.time_ms, line.step)
                for line in lines
                for key, value in line.metrics.items()
            ]
            self.client.log_batch(self.state.run_id, metrics)
            self.save(sent_bytes=end)

    def send_files(self) -> None:
        for name, path in self.metadata.files.items():
            if self.state.files.get(name) != path:
                parent = name.rpartition("/")[0] or None
                self.client.log_artifact(self.state.run_id, str(path), parent)
                self.save(files=self.state.files | {name: path})

    def send_status(self) -> None:
        run_id, status, error = self.state.run_id, self.metadata.status, self.metadata.error
        if self.state.status == status:
            return
        if error:
            self.client.set_tag(run_id, Tag.ERROR, error[:MAX_TAG_LENGTH])
        elif Tag.ERROR in self.client.get_run(run_id).data.tags:
            self.client.delete_tag(run_id, Tag.ERROR)
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status)
        self.save(status=status)


def _to_mlflow_dataset(dataset: DatasetInfo) -> entities.DatasetInput:
    column = {"name": dataset.text_column, "type": "string"}
    return entities.DatasetInput(
        entities.Dataset(
            name=dataset.name,
            digest=dataset.digest,
            source_type="local",
            source=json.dumps({"uri": dataset.sources[0], "sources": dataset.sources}),
            schema=json.dumps({"mlflow_colspec": [column]}),
            profile=json.dumps(dataset.profile),
        ),
        [entities.InputTag("mlflow.data.context", "training")],
    )
