"""The champion as a challenger meets it: its weights, its data set, and what was tried before."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from gpt.artifacts import Artifact, DatasetManifest
from gpt.data.continued import DERIVED_DATASETS
from gpt.data.shards import MANIFEST, read_manifest
from gpt.errors import DatasetError
from tasks.tracking import mlflow_settings
from tasks.tracking.model_lookup import (
    ALIAS_TAG,
    CHAMPION,
    REASON_TAG,
    STEP_TAG,
    TRIAL_TAG,
    asking,
    cannot,
    existing,
    fetch_model,
)

mlflow_settings.apply()

from mlflow.entities import Run  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

FINGERPRINT, FRACTION = "dataset.fingerprint", "data.validation_fraction"
"""Parameters of a run."""


class Champion(Artifact):
    """`<name> version <version>`, and what is left of what it was trained on."""

    name: str
    version: str
    location: str
    """Where its files are stored: names it for good, in whatever registry."""
    step: int
    dataset: DatasetManifest | None
    """What is known of its data set; None: nothing is."""
    dataset_is_local: bool = False
    """Whether the shards lie in `dataset.folder`."""
    validation_fraction: float | None = None
    """None: not known."""

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


class EarlierTrial(Artifact):
    """What came of an earlier challenger."""

    version: str
    alias: str
    """The one that it was given then."""
    reason: str


def find_champion(name: str, uri: str, root: Path) -> Champion | None:
    """Of the registered model `name` at the MLflow of `uri`; None where it has no version yet.

    Raises `RegistryError` where MLflow cannot be asked, or where there are versions and none of
    them is the champion: then no challenger could become it.
    """
    if not _store_is_there(uri):
        return None
    with asking(f"models:/{name}@{CHAMPION}", uri):
        client = MlflowClient(tracking_uri=uri)
        model = existing(lambda: client.get_registered_model(name))
        versions = client.search_model_versions(f"name = '{name}'") if model else []
        if not versions:
            return None
        number = str(model.aliases.get(CHAMPION, ""))
        if not number:
            known = ", ".join(str(version.version) for version in versions)
            rule = f"none of its versions ({known}) is the {CHAMPION}, so that nothing can beat it"
            remedy = f"give the alias {CHAMPION} to the version that is to be held against"
            raise cannot(name, rule, remedy)
        version = client.get_model_version(name, number)
        location = client.get_model_version_download_uri(name, number)
        run = version.run_id and existing(lambda: client.get_run(version.run_id))
        dataset, here = _dataset_of(client, run, root) if run else (None, False)
        fraction = run.data.params.get(FRACTION) if run else None
        return Champion(
            name=name,
            version=number,
            location=location,
            step=int(version.tags.get(STEP_TAG, 0)),
            dataset=dataset,
            dataset_is_local=here,
            validation_fraction=dataset.validation_fraction if dataset else _number(fraction),
        )


def fetch_champion(champion: Champion, uri: str, root: Path) -> Path:
    """The folder of its weights, fetched where they are stored elsewhere. Raises
    `RegistryError`."""
    return fetch_model(f"models:/{champion.name}/{champion.version}", uri, root)


def find_earlier_trial(name: str, uri: str, trial: str) -> EarlierTrial | None:
    """What came of the version that was made of this trial, the last one; None where it was not
    tried, or not judged. Raises `RegistryError` where MLflow cannot be asked."""
    if not _store_is_there(uri):
        return None
    with asking(name, uri):
        client = MlflowClient(tracking_uri=uri)
        versions = client.search_model_versions(f"name = '{name}'")
        judged = [version for version in versions if version.tags.get(TRIAL_TAG) == trial]
        if not judged:
            return None
        last = max(judged, key=lambda version: int(version.version))
        return EarlierTrial(
            version=str(last.version),
            alias=last.tags.get(ALIAS_TAG, ""),
            reason=last.tags[REASON_TAG],
        )


def _store_is_there(uri: str) -> bool:
    """An SQLite store that no run has made yet must not be made by asking."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def _dataset_of(client: MlflowClient, run: Run, root: Path) -> tuple[DatasetManifest | None, bool]:
    """The run's data set as it lies here, else its manifest as MLflow keeps it; whether it is
    here."""
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
        with contextlib.suppress(ValueError):  # of another version of ours
            values = json.loads(path.read_bytes()) | {"folder": root / "datasets"}
            return DatasetManifest.model_validate(values), False
    return None, False


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
