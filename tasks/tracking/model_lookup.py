"""The models that MLflow's registry has: found again by name, their files fetched."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt.errors import Problem, RegistryError
from gpt.evaluation.report_store import REPORT_FILE
from gpt.files import atomic_folder
from gpt.model.section import CONFIG_FILE, MODEL_FILE
from gpt.training.checkpoint.retention import PROGRESS_FILE
from tasks.tracking import mlflow_settings

mlflow_settings.apply()

from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode  # noqa: E402
from mlflow.store.artifact.artifact_repository_registry import (  # noqa: E402
    get_artifact_repository,
)
from mlflow.tracking import MlflowClient  # noqa: E402
from mlflow.utils.file_utils import get_local_path_or_none  # noqa: E402

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous-champion"
UID_TAG, STEP_TAG, LOSS_TAG = "overnight.uid", "overnight.step", "overnight.loss"
REASON_TAG, ALIAS_TAG = "overnight.reason", "overnight.alias"
AGAINST_TAG = "overnight.judged_against"
"""The version that was the champion when this one was judged; empty: there was none."""
TRIAL_TAG = "overnight.trial"
"""What was tried by it as a retraining, so that a challenger that lost is not trained again."""
SAVED_FILES = (MODEL_FILE, CONFIG_FILE, PROGRESS_FILE, REPORT_FILE)
"""What is stored of a model, beside what MLflow needs to load it."""


# --- by name -------------------------------------------------------------------------------------


def fetch_model(name: str, uri: str, root: Path) -> Path:
    """The folder of the model that `name`, as models:/gpt@champion or models:/gpt/3, stands for at
    the MLflow of `uri`: where it is stored, or, fetched once, below `root`/models. Raises
    `RegistryError`."""
    match = _NAME.fullmatch(name)
    if not match:
        rule = "is no name of a registered model"
        raise cannot(name, rule, f"give one as models:/gpt@{CHAMPION} or models:/gpt/3")
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        rule = f"no run has registered a model yet: {database} is not there"
        raise cannot(name, rule, "name another --root, or a server with MLFLOW_TRACKING_URI")
    with asking(name, uri):
        return _fetched(MlflowClient(tracking_uri=uri), name, match, root)


@contextmanager
def asking(name: str, uri: str) -> Iterator[None]:
    """For calls about `name`: whatever MLflow raises becomes a `RegistryError`."""
    try:
        yield
    except RegistryError:
        raise
    except Exception as error:
        rule = f"MLflow at {uri} cannot be asked: {first_line(error)}"
        remedy = "start that server, or name another with MLFLOW_TRACKING_URI"
        raise cannot(name, rule, remedy) from error


_NAME = re.compile(r"models:/(?P<name>[^/:@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")


def cannot(name: str, rule: str, remedy: str) -> RegistryError:
    return RegistryError(Problem("MODEL", name, rule, remedy))


def _fetched(client: MlflowClient, name: str, match: re.Match[str], root: Path) -> Path:
    version = _version_named(client, name, match)
    location = client.get_model_version_download_uri(match["name"], version)
    local = local_folder(location)
    if local:
        if not (local / MODEL_FILE).is_file():
            rule, remedy = f"there is no {MODEL_FILE} in {local}", "name another version"
            raise cannot(name, rule, remedy)
        return local
    place = hashlib.sha256(f"{client.tracking_uri} {location}".encode()).hexdigest()[:8]
    folder = root / "models" / f"{match['name']}-{version}-{place}"
    if not folder.exists():
        with atomic_folder(folder) as partial:
            files = stored_files(client, location, SAVED_FILES, partial)
            if not {MODEL_FILE, CONFIG_FILE} <= {path.name for path in files}:
                rule = f"there is no {MODEL_FILE} with a {CONFIG_FILE} in {location}"
                raise cannot(name, rule, "name another version")
    return folder


def _version_named(client: MlflowClient, name: str, match: re.Match[str]) -> str:
    """The number of the version, after a look whether it is there."""
    if not (model := existing(lambda: client.get_registered_model(match["name"]))):
        known = ", ".join(each.name for each in client.search_registered_models())
        rule = f"there is no registered model {match['name']} at {client.tracking_uri}"
        raise cannot(name, rule, f"give one of: {known or 'none yet; a finished run makes one'}")
    if match["alias"]:
        version = str(model.aliases.get(match["alias"], ""))
    else:
        found = existing(lambda: client.get_model_version(match["name"], match["version"]))
        version = str(found.version) if found else ""
    if not version:
        versions = client.search_model_versions(f"name = '{match['name']}'")
        known = ", ".join(
            [f"models:/{model.name}@{alias}" for alias in sorted(model.aliases)]
            + [f"models:/{model.name}/{each.version}" for each in versions]
        )
        what = f"alias {match['alias']}" if match["alias"] else f"version {match['version']}"
        raise cannot(name, f"{model.name} has no {what}", f"give one of: {known or 'none yet'}")
    return version


def existing(ask: Callable[[], Any]) -> Any:
    """What MLflow answers; None where it says that there is no such thing."""
    try:
        return ask()
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return None


def holder(client: MlflowClient, name: str, alias: str) -> str:
    """The version that has the alias; empty: none has."""
    return str(client.get_registered_model(name).aliases.get(alias, ""))


# --- files of a stored model ---------------------------------------------------------------------


def stored_files(
    client: MlflowClient, location: str, names: Sequence[str], folder: Path
) -> list[Path]:
    """Those of `names` that are stored at `location`: as they lie there where that is a local
    folder, else fetched into `folder`. Raises whatever MLflow raises."""
    if local := local_folder(location):
        return [local / name for name in names if (local / name).is_file()]
    repository = get_artifact_repository(location, tracking_uri=client.tracking_uri)
    there = {Path(file.path).name for file in repository.list_artifacts()}
    wanted = [name for name in names if name in there]
    return [Path(repository.download_artifacts(name, str(folder))) for name in wanted]


def local_folder(location: str) -> Path | None:
    """Of an artifact location that is a path; None for one that must be fetched from."""
    path = get_local_path_or_none(location)
    return Path(path) if path else None


def first_line(error: Exception) -> str:
    """Of what an error says: MLflow's can fill a page."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
