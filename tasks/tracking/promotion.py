"""Whether a new version takes the champion's place: both on the same slice, by more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gpt.artifacts import EvaluationReport
from gpt.evaluation.report_store import REPORT_FILE, load_champion_report, read_report_file
from tasks.tracking import mlflow_settings
from tasks.tracking.journal import PendingModel
from tasks.tracking.model_lookup import (
    AGAINST_TAG,
    ALIAS_TAG,
    CHALLENGER,
    CHAMPION,
    REASON_TAG,
    holder,
    stored_files,
)

if TYPE_CHECKING:
    from gpt.evaluation.significance import PromotionDecision

mlflow_settings.apply()

from mlflow.entities.model_registry import ModelVersion  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402


def decide_promotion(
    client: MlflowClient,
    versions: Sequence[ModelVersion],
    version: ModelVersion,
    folder: Path,
    entry: PendingModel,
) -> tuple[ModelVersion, bool]:
    """The version with the judgement among its tags, where it stays; whether it could be held
    against the champion."""
    name, champion = version.name, holder(client, version.name, CHAMPION)
    earlier = sum(int(other.version) < int(version.version) for other in versions)
    judgement = _judgement(client, name, champion, earlier, folder, report_of(entry))
    tags = {
        AGAINST_TAG: champion,
        ALIAS_TAG: CHAMPION if judgement.promoted else CHALLENGER,
        REASON_TAG: judgement.reason,  # the last, because it says that all are there
    }
    for key, value in tags.items():
        client.set_model_version_tag(name, version.version, key, value)
    return client.get_model_version(name, version.version), judgement.comparable


def _judgement(
    client: MlflowClient,
    name: str,
    champion: str,
    earlier: int,
    folder: Path,
    report: EvaluationReport,
) -> PromotionDecision:
    """Whether it becomes the champion, and why. What cannot be compared promotes nobody."""
    from gpt.evaluation.significance import (  # loads scipy, which takes a second
        PromotionDecision,
        compare_with_champion,
    )

    if not champion and earlier:
        rule = (
            f"there is nothing to be held against: none of the {earlier} versions before this one "
            f"is the {CHAMPION}; give that alias to the one that is to be"
        )
        return PromotionDecision(False, rule, comparable=False)
    theirs = _report_on(client, folder, name, champion) if champion else None
    if champion and not theirs:
        rule = (
            f"cannot be held against the {CHAMPION}, version {champion}: its "
            f"{REPORT_FILE} is missing or cannot be read; "
            f"give the alias {CHAMPION} to a version that has one"
        )
        return PromotionDecision(False, rule, comparable=False)
    return compare_with_champion(report, theirs)


def _report_on(
    client: MlflowClient, folder: Path, name: str, version: str
) -> EvaluationReport | None:
    """On a version: the one that the run's folder keeps, of the run's own slice, else the one that
    lies beside its weights, which may be of another."""
    location = client.get_model_version_download_uri(name, version)
    return load_champion_report(folder, location) or _stored_report(client, name, version)


def can_compare_now(client: MlflowClient, folder: Path, name: str, entry: PendingModel) -> bool:
    """Whether what could not be held against the champion can be: the run's folder has come to keep
    a report on it."""
    champion = holder(client, name, CHAMPION)
    if not champion:
        return False
    kept = load_champion_report(folder, client.get_model_version_download_uri(name, champion))
    return bool(kept and kept.slice_fingerprint == report_of(entry).slice_fingerprint)


def _stored_report(client: MlflowClient, name: str, version: str) -> EvaluationReport | None:
    """The report that lies beside a version's weights."""
    location = client.get_model_version_download_uri(name, version)
    with TemporaryDirectory() as folder:
        try:
            files = stored_files(client, location, (REPORT_FILE,), Path(folder))
        except Exception:
            if location.startswith(("mlflow-artifacts:", "http")):  # MLflow itself: it is away
                raise
            return None  # another store, as one that this machine has no keys for
        return read_report_file(files[0]) if files else None


def report_of(entry: PendingModel) -> EvaluationReport:
    [path] = [path for path in entry.files if path.name == REPORT_FILE]
    report = read_report_file(path)
    assert report, f"{path} was written by the evaluate task"
    return report
