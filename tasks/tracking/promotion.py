"""The promotion rule: a new version becomes the champion only if it is better beyond chance.

Both are compared on the same validation slice (`gpt.evaluation.significance`). A version that
cannot be compared stays a challenger.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from gpt.artifacts import EvaluationReport
from gpt.evaluation.report_store import REPORT_FILE, load_champion_report, read_report_file
from tasks.tracking.journal import PendingModel
from tasks.tracking.mlflow_api import Alias, MlflowClient, ModelVersion, Tag
from tasks.tracking.model_lookup import fetch_files, version_with_alias
from tasks.tracking.sync import RunSync

if TYPE_CHECKING:
    from gpt.evaluation.significance import PromotionDecision


def decide_promotion(
    sync: RunSync, versions: Sequence[ModelVersion], version: ModelVersion, model: PendingModel
) -> tuple[ModelVersion, bool]:
    """Compare a version with the champion and store the decision in its tags.

    `versions` are all versions of the registered model. Returns the version with its tags, and
    whether it could be compared.
    """
    name, champion = version.name, version_with_alias(sync.client, version.name, Alias.CHAMPION)
    earlier = sum(int(other.version) < int(version.version) for other in versions)
    decision = _compare(sync, name, champion, earlier, model)
    tags = {
        Tag.AGAINST: champion,
        Tag.ALIAS: Alias.CHAMPION if decision.promoted else Alias.CHALLENGER,
        Tag.REASON: decision.reason,  # last, because its presence means that the others are there
    }
    for key, value in tags.items():
        sync.client.set_model_version_tag(name, version.version, key, value)
    return sync.client.get_model_version(name, version.version), decision.comparable


def _compare(
    sync: RunSync, name: str, champion: str, earlier: int, model: PendingModel
) -> PromotionDecision:
    # The import loads scipy, which takes a second.
    from gpt.evaluation.significance import PromotionDecision, compare_with_champion

    if not champion and earlier:
        reason = (
            f"there is no champion to compare with: none of the {earlier} earlier versions has "
            "that alias; give it to one of them"
        )
        return PromotionDecision(False, reason, comparable=False)
    champion_report = None
    if champion:
        # The run folder's report covers the run's own slice; the stored one may cover another.
        location = sync.client.get_model_version_download_uri(name, champion)
        stored = load_champion_report(sync.folder, location)
        champion_report = stored or _fetch_report(sync.client, location)
        if champion_report is None:
            reason = (
                f"cannot be compared with the champion, version {champion}: its {REPORT_FILE} is "
                "missing or cannot be read; give the alias to a version that has one"
            )
            return PromotionDecision(False, reason, comparable=False)
    return compare_with_champion(load_model_report(model), champion_report)


def can_compare_now(sync: RunSync, name: str, model: PendingModel) -> bool:
    """Return whether the run folder has got a report on the champion since the last decision."""
    champion = version_with_alias(sync.client, name, Alias.CHAMPION)
    if not champion:
        return False
    location = sync.client.get_model_version_download_uri(name, champion)
    report = load_champion_report(sync.folder, location)
    return bool(report and report.slice_fingerprint == load_model_report(model).slice_fingerprint)


def assign_alias(client: MlflowClient, version: ModelVersion) -> None:
    """Give a version the alias of its promotion decision, unless a later change has overtaken it:
    another champion since, or a newer challenger."""
    name, alias = version.name, version.tags[Tag.ALIAS]
    current = version_with_alias(client, name, alias)
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


def load_model_report(model: PendingModel) -> EvaluationReport:
    [path] = [path for path in model.files if path.name == REPORT_FILE]
    report = read_report_file(path)
    assert report, f"{path} was written by the evaluate task"
    return report
