"""The champion and earlier challengers, as a retraining needs them."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from gpt.artifacts import Artifact, DatasetManifest
from gpt.data.continued import DERIVED_DATASETS
from gpt.data.shards import MANIFEST, read_manifest
from gpt.errors import DatasetError
from tasks.tracking.mlflow_api import Alias, MlflowClient, Tag, entities, get_or_none
from tasks.tracking.model_lookup import (
    fetch_model,
    registry_error,
    registry_errors,
    sqlite_store_exists,
)

FINGERPRINT, FRACTION = "dataset.fingerprint", "data.validation_fraction"
"""Parameters of a run."""


class Champion(Artifact):
    """The champion of a registered model, and what is known of its dataset."""

    name: str
    version: str
    location: str
    """Where its files are stored: identifies it across registries."""
    step: int
    dataset: DatasetManifest | None
    """None: unknown."""
    dataset_is_local: bool = False
    """Whether the shards are in `dataset.folder`."""
    validation_fraction: float | None = None
    """None: unknown."""

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


class EarlierTrial(Artifact):
    """The result of an earlier challenger with the same data and settings."""

    version: str
    alias: str
    """As decided at its registration."""
    reason: str


def find_champion(name: str, uri: str, root: Path) -> Champion | None:
    """Return the champion of the registered model `name`, or None if it has no version yet.

    Raises `RegistryError` if MLflow cannot be reached, or if no version has the alias: then no
    challenger could be promoted.
    """
    if not sqlite_store_exists(uri):
        return None
    with registry_errors(f"models:/{name}@{Alias.CHAMPION}", uri):
        client = MlflowClient(tracking_uri=uri)
        model = get_or_none(lambda: client.get_registered_model(name))
        versions = client.search_model_versions(f"name = '{name}'") if model else []
        if not versions:
            return None
        number = str(model.aliases.get(Alias.CHAMPION, ""))
        if not number:
            known = ", ".join(str(version.version) for version in versions)
            rule = f"none of its versions ({known}) has the alias {Alias.CHAMPION}"
            raise registry_error(name, rule, "give the alias champion to the version to beat")
        version = client.get_model_version(name, number)
        run = version.run_id and get_or_none(lambda: client.get_run(version.run_id))
        dataset, is_local = _find_dataset(client, run, root) if run else (None, False)
        fraction = run.data.params.get(FRACTION) if run else None  # pydantic makes it a number
        return Champion(
            name=name,
            version=number,
            location=client.get_model_version_download_uri(name, number),
            step=int(version.tags.get(Tag.STEP, 0)),
            dataset=dataset,
            dataset_is_local=is_local,
            validation_fraction=dataset.validation_fraction if dataset else fraction,
        )


def fetch_champion(champion: Champion, uri: str, root: Path) -> Path:
    """Return the folder of its weights, downloaded if necessary. Raises `RegistryError`."""
    return fetch_model(f"models:/{champion.name}/{champion.version}", uri, root)


def find_earlier_trial(name: str, uri: str, trial: str) -> EarlierTrial | None:
    """Return the result of the last version with this trial key, or None. Raises `RegistryError`
    if MLflow cannot be reached."""
    if not sqlite_store_exists(uri):
        return None
    with registry_errors(name, uri):
        client = MlflowClient(tracking_uri=uri)
        versions = client.search_model_versions(f"name = '{name}'")
        matching = [version for version in versions if version.tags.get(Tag.TRIAL) == trial]
        if not matching:
            return None
        last = max(matching, key=lambda version: int(version.version))
        return EarlierTrial(
            version=str(last.version),
            alias=last.tags.get(Tag.ALIAS, ""),
            reason=last.tags[Tag.REASON],
        )


def _find_dataset(
    client: MlflowClient, run: entities.Run, root: Path
) -> tuple[DatasetManifest | None, bool]:
    """Return the manifest of the run's dataset, from `root` or from MLflow, and whether the
    dataset is in `root`."""
    fingerprint = run.data.params.get(FINGERPRINT, "")
    for kind in ("datasets", DERIVED_DATASETS):
        with contextlib.suppress(DatasetError):
            found = read_manifest(root / kind / fingerprint[:16])
            if found.fingerprint == fingerprint:
                return found, True
    name = f"dataset/{MANIFEST}"
    if name not in {file.path for file in client.list_artifacts(run.info.run_id, "dataset")}:
        return None, False
    with TemporaryDirectory() as folder:
        path = Path(client.download_artifacts(run.info.run_id, name, folder))
        with contextlib.suppress(ValueError):  # written by another version of this program
            values = json.loads(path.read_bytes()) | {"folder": root / "datasets"}
            return DatasetManifest.model_validate(values), False
    return None, False
