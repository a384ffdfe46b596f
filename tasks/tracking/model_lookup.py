"""Models in MLflow's registry: look them up by name and fetch their files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from gpt.errors import Problem, RegistryError
from gpt.evaluation.report_store import REPORT_FILE
from gpt.files import atomic_folder
from gpt.model.section import CONFIG_FILE, MODEL_FILE
from gpt.training.checkpoint.retention import PROGRESS_FILE
from tasks.tracking.mlflow_api import MlflowClient, artifacts, error_summary, get_or_none

SAVED_FILES = (MODEL_FILE, CONFIG_FILE, PROGRESS_FILE, REPORT_FILE)
"""What is stored of a model besides the files that MLflow needs to load it."""

_MODEL_URI = re.compile(r"models:/(?P<name>[^/:@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")


# --- by name -------------------------------------------------------------------------------------


def fetch_model(name: str, uri: str, root: Path) -> Path:
    """Return the folder of a registered model such as models:/gpt@champion or models:/gpt/3.

    A model on this machine is used in place; another is downloaded once, below `root`/models.
    Raises `RegistryError`.
    """
    match = _MODEL_URI.fullmatch(name)
    if not match:
        rule = "not the name of a registered model"
        raise registry_error(name, rule, "use models:/gpt@champion or models:/gpt/3")
    if not sqlite_store_exists(uri):
        rule = f"no run has registered a model yet: {uri.removeprefix('sqlite:///')} does not exist"
        raise registry_error(name, rule, "use another --root, or set MLFLOW_TRACKING_URI")
    with registry_errors(name, uri):
        client = MlflowClient(tracking_uri=uri)
        version = _resolve_version(client, name, match)
        location = client.get_model_version_download_uri(match["name"], version)
        if local := local_path(location):
            if not (local / MODEL_FILE).is_file():
                rule = f"there is no {MODEL_FILE} in {local}"
                raise registry_error(name, rule, "use another version")
            return local
        store = hashlib.sha256(f"{uri} {location}".encode()).hexdigest()[:8]
        folder = root / "models" / f"{match['name']}-{version}-{store}"
        if not folder.exists():
            with atomic_folder(folder) as partial:
                files = fetch_files(client, location, SAVED_FILES, partial)
                if not {MODEL_FILE, CONFIG_FILE} <= {path.name for path in files}:
                    rule = f"there is no {MODEL_FILE} with a {CONFIG_FILE} in {location}"
                    raise registry_error(name, rule, "use another version")
        return folder


@contextmanager
def registry_errors(name: str, uri: str) -> Iterator[None]:
    """Turn whatever MLflow raises in the block into a `RegistryError` about `name`."""
    try:
        yield
    except RegistryError:
        raise
    except Exception as error:
        rule = f"MLflow at {uri} cannot be reached: {error_summary(error)}"
        remedy = "start the server, or set MLFLOW_TRACKING_URI to another one"
        raise registry_error(name, rule, remedy) from error


def registry_error(name: str, rule: str, remedy: str) -> RegistryError:
    return RegistryError(Problem("MODEL", name, rule, remedy))


def sqlite_store_exists(uri: str) -> bool:
    """Return False for a SQLite store without a file: a query would create it. Else True."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def _resolve_version(client: MlflowClient, name: str, match: re.Match[str]) -> str:
    """Return the number of the version that the alias or number names. Raises `RegistryError` with
    the names that exist."""
    model = get_or_none(lambda: client.get_registered_model(match["name"]))
    if not model:
        known = ", ".join(each.name for each in client.search_registered_models())
        rule = f"there is no registered model {match['name']} at {client.tracking_uri}"
        raise registry_error(name, rule, f"use one of: {known or 'none yet; finish a run first'}")
    versions = client.search_model_versions(f"name = '{model.name}'")
    numbers = [str(version.version) for version in versions]
    alias, number = match["alias"], match["version"]
    number = str(model.aliases.get(alias, "")) if alias else number
    if number in numbers:
        return number
    names = [f"@{alias}" for alias in sorted(model.aliases)] + [f"/{number}" for number in numbers]
    known = ", ".join(f"models:/{model.name}{suffix}" for suffix in names)
    what = f"alias {alias}" if alias else f"version {number}"
    raise registry_error(name, f"{model.name} has no {what}", f"use one of: {known or 'none yet'}")


def version_with_alias(client: MlflowClient, name: str, alias: str) -> str:
    """Return the version that has the alias, or "" if none has it."""
    return str(client.get_registered_model(name).aliases.get(alias, ""))


# --- files of a stored model ---------------------------------------------------------------------


def fetch_files(
    client: MlflowClient, location: str, names: Sequence[str], folder: Path
) -> list[Path]:
    """Return those of `names` that are stored at `location`, downloaded to `folder` unless they
    are on this machine. Raises what MLflow raises."""
    if local := local_path(location):
        return [local / name for name in names if (local / name).is_file()]
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
