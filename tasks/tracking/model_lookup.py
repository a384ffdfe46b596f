"""Models in MLflow's registry: by name, the champion, and earlier challengers."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit
from urllib.request import url2pathname

from gpt.artifacts import Artifact, DatasetManifest
from gpt.data.continued import find_dataset_by_fingerprint
from gpt.data.shards import MANIFEST, parse_manifest
from gpt.errors import Problem, RegistryError, first_line
from gpt.evaluation.report_store import REPORT_FILE
from gpt.files import atomic_folder
from gpt.model.section import CONFIG_FILE, MODEL_FILE
from gpt.training.checkpoint.retention import PROGRESS_FILE
from tasks.tracking.journal import RegisteredVersion
from tasks.tracking.mlflow_api import (
    Alias,
    MlflowClient,
    ModelVersion,
    Tag,
    artifacts,
    entities,
    get_or_none,
)

MODEL_FILES = (MODEL_FILE, CONFIG_FILE, PROGRESS_FILE)
"""What is stored of a model besides its report and the files that MLflow needs to load it."""
FINGERPRINT, FRACTION = "dataset.fingerprint", "data.validation_fraction"
"""Parameters of a run."""
SQLITE = "sqlite:///"

_MODEL_URI = re.compile(r"models:/(?P<name>[^/:@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")


def fetch_model(name: str, uri: str, root: Path) -> Path:
    """Return the folder of a registered model such as models:/gpt@champion or models:/gpt/3.

    A model on this machine is used in place; another is downloaded once, below `root`/models.
    Raises `RegistryError`.
    """
    match = _MODEL_URI.fullmatch(name)
    if not match:
        rule = "not the name of a registered model"
        raise registry_error(name, rule, "use models:/gpt@champion or models:/gpt/3")
    with registry_client(name, uri) as client:
        if client is None:
            rule = f"no run has registered a model yet: {uri.removeprefix(SQLITE)} does not exist"
            raise registry_error(name, rule, "use another --root, or set MLFLOW_TRACKING_URI")
        version = _resolve_version(client, name, match)
        location = client.get_model_version_download_uri(match["name"], version)
        if local := local_path(location):
            return _check_model(local, name, location)
        store = hashlib.sha256(f"{uri} {location}".encode()).hexdigest()[:8]
        folder = root / "models" / f"{match['name']}-{version}-{store}"
        if not folder.exists():
            with atomic_folder(folder) as partial:
                fetch_files(client, location, (*MODEL_FILES, REPORT_FILE), partial)
                _check_model(partial, name, location)
        return folder


def _check_model(folder: Path, name: str, location: str) -> Path:
    if not all((folder / file).is_file() for file in (MODEL_FILE, CONFIG_FILE)):
        rule = f"there is no {MODEL_FILE} with a {CONFIG_FILE} in {location}"
        raise registry_error(name, rule, "use another version")
    return folder


@contextmanager
def registry_client(name: str, uri: str) -> Iterator[MlflowClient | None]:
    """Open a client; None for a SQLite store without a file, which a query would create. Whatever
    MLflow raises in the block becomes a `RegistryError` about `name`."""
    is_missing = uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists()
    try:
        yield None if is_missing else MlflowClient(tracking_uri=uri)
    except RegistryError:
        raise
    except Exception as error:
        rule = f"MLflow at {uri} cannot be reached: {first_line(error)}"
        remedy = "start the server, or set MLFLOW_TRACKING_URI to another one"
        raise registry_error(name, rule, remedy) from error


def registry_error(name: str, rule: str, remedy: str) -> RegistryError:
    return RegistryError(Problem("MODEL", name, rule, remedy))


def find_registered(
    client: MlflowClient, name: str
) -> tuple[dict[str, str], list[ModelVersion]] | None:
    """Return aliases and versions of a registered model, or None if there is no such model."""
    model = get_or_none(lambda: client.get_registered_model(name))
    if model is None:
        return None
    aliases = {alias: str(version) for alias, version in model.aliases.items()}
    return aliases, list(client.search_model_versions(f"name = '{name}'"))


def _resolve_version(client: MlflowClient, name: str, match: re.Match[str]) -> str:
    """Return the number of the version that the alias or number names. Raises `RegistryError` with
    the names that exist."""
    model, alias = match["name"], match["alias"]
    found = find_registered(client, model)
    if not found:
        known = ", ".join(each.name for each in client.search_registered_models())
        rule = f"there is no registered model {model} at {client.tracking_uri}"
        raise registry_error(name, rule, f"use one of: {known or 'none yet; finish a run first'}")
    versions = {f"models:/{model}@{each}": version for each, version in sorted(found[0].items())}
    versions |= {f"models:/{model}/{each.version}": str(each.version) for each in found[1]}
    if name not in versions:
        rule = f"{model} has no " + (f"alias {alias}" if alias else f"version {match['version']}")
        raise registry_error(name, rule, f"use one of: {', '.join(versions) or 'none yet'}")
    return versions[name]


def fetch_files(
    client: MlflowClient, location: str, names: Sequence[str], folder: Path
) -> list[Path]:
    """Copy or download those of `names` that are stored at `location` to `folder`. Raises what
    MLflow raises."""
    store = {"tracking_uri": client.tracking_uri}
    listed = artifacts.list_artifacts(artifact_uri=location, **store)
    stored = {Path(file.path).name for file in listed}
    return [
        Path(artifacts.download_artifacts(f"{location}/{name}", dst_path=str(folder), **store))
        for name in names
        if name in stored
    ]


def local_path(location: str) -> Path | None:
    """Return the path of an artifact location on this machine, or None for a remote one."""
    parts = urlsplit(location)
    if parts.scheme == "file" and not parts.netloc:
        return Path(url2pathname(parts.path))
    return None if parts.scheme else Path(location)


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


def find_champion(name: str, uri: str, root: Path) -> Champion | None:
    """Return the champion of the registered model `name`, or None if it has no version yet.

    Raises `RegistryError` if MLflow cannot be reached, or if no version has the alias: then no
    challenger could be promoted.
    """
    with registry_client(f"models:/{name}@{Alias.CHAMPION}", uri) as client:
        aliases, versions = (client and find_registered(client, name)) or ({}, [])
        if not client or not versions:
            return None
        number = aliases.get(Alias.CHAMPION)
        if not number:
            known = ", ".join(str(version.version) for version in versions)
            rule = f"none of its versions ({known}) has the alias {Alias.CHAMPION}"
            raise registry_error(name, rule, "give the alias champion to the version to beat")
        version = client.get_model_version(name, number)
        run = version.run_id and get_or_none(lambda: client.get_run(version.run_id))
        local = run and find_dataset_by_fingerprint([root], run.data.params.get(FINGERPRINT, ""))
        dataset = local or (_fetch_manifest(client, run, root) if run else None)
        fraction = run.data.params.get(FRACTION) if run else None  # pydantic makes it a number
        return Champion(
            name=name,
            version=number,
            location=client.get_model_version_download_uri(name, number),
            step=int(version.tags.get(Tag.STEP, 0)),
            dataset=dataset,
            dataset_is_local=bool(local),
            validation_fraction=dataset.validation_fraction if dataset else fraction,
        )


def find_earlier_trial(name: str, uri: str, trial: str) -> RegisteredVersion | None:
    """Return the last version with this trial key, as decided at its registration, or None. Raises
    `RegistryError` if MLflow cannot be reached."""
    with registry_client(name, uri) as client:
        versions = client.search_model_versions(f"name = '{name}'") if client else []
        matching = [version for version in versions if version.tags.get(Tag.TRIAL) == trial]
        if not matching:
            return None
        return to_registered_version(max(matching, key=lambda version: int(version.version)))


def to_registered_version(version: ModelVersion, comparable: bool = True) -> RegisteredVersion:
    """Return what the tags of a version say of it."""
    return RegisteredVersion(
        name=version.name,
        version=str(version.version),
        step=int(version.tags.get(Tag.STEP, 0)),
        alias=version.tags.get(Tag.ALIAS, ""),
        reason=version.tags[Tag.REASON],
        comparable=comparable,
        trial=version.tags.get(Tag.TRIAL, ""),
    )


def _fetch_manifest(client: MlflowClient, run: entities.Run, root: Path) -> DatasetManifest | None:
    """Return the manifest that MLflow has of the dataset of a run, or None."""
    with TemporaryDirectory() as folder:
        location = f"{run.info.artifact_uri}/dataset"
        for path in fetch_files(client, location, (MANIFEST,), Path(folder)):
            with suppress(ValueError):  # written by another version of this program
                return parse_manifest(path.read_bytes(), root / "datasets")
    return None
