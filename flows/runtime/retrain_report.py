"""The result of a retraining, and its page."""

from __future__ import annotations

from flows.runtime.outcome import Outcome
from gpt.artifacts import Artifact, EvaluationReport
from gpt.markdown import render_table
from tasks.evaluate import ReportPair, SliceReports


class TokenCounts(Artifact):
    """Tokens of a dataset by origin."""

    tokenized: int
    """Tokenized for this retraining."""
    reused: int
    """Reused from earlier datasets."""


class RetrainResult(Artifact):
    """What a retraining did; `outcome` is None if there was nothing to do."""

    name: str
    reason: str
    """Why there was something to do, or why not."""
    notes: tuple[str, ...] = ()
    start: str = ""
    text: TokenCounts | None = None
    champion: str = ""
    """The champion before this retraining; empty if there was none."""
    outcome: Outcome | None = None
    slices: SliceReports | None = None
    prefect_ui: str
    mlflow_ui: str

    def __str__(self) -> str:
        return "; ".join(f"{name}: {text}" for name, text in self.lines)

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The report as pairs of heading and text."""
        lines = [("source", self.reason), *(("note", note) for note in self.notes)]
        if self.text:
            counts = f"{self.text.tokenized:,} tokenized, {self.text.reused:,} reused"
            lines.append(("tokens", counts))
        if self.outcome is None:
            return lines
        length = f"{self.outcome.report.step:,} steps, {self.outcome.tokens_seen:,} tokens"
        lines.append(("challenger", f"trained from {self.start}: {length}"))
        lines += _slice_lines(self.outcome.report, self.slices, self.champion)
        registered = self.outcome.registered
        lines.append(("verdict", str(registered or "not yet: MLflow was unreachable")))
        lines.append(("run", str(self.outcome.folder)))
        return lines


def _slice_lines(
    report: EvaluationReport, slices: SliceReports | None, champion: str
) -> list[tuple[str, str]]:
    count = f"loss over {report.tokens:,} tokens"
    if slices is None:
        return [("current slice", f"challenger {report.loss:.4f} ({count})")]
    lines = [("current slice", f"{_losses(slices.current, champion)} ({count})")]
    for name, pair, better, worse in (
        ("old slice", slices.old, "better on it too", "the challenger has forgotten some of it"),
        ("new text", slices.new, "the challenger has learned it", "worse on it too"),
    ):
        if pair:
            lines.append((name, f"{_losses(pair, champion)}: {_compare(pair, better, worse)}"))
    if slices.old and slices.old.challenger.slice_fingerprint == report.slice_fingerprint:
        same = (
            "the current slice equals the old one: new text comes after the first "
            f"{report.tokens:,} validation tokens; raise evaluation.tokens to include it"
        )
        lines.append(("note", same))
    return lines


def _losses(pair: ReportPair, champion: str) -> str:
    return f"challenger {pair.challenger.loss:.4f}, {champion} {pair.champion.loss:.4f}"


def _compare(pair: ReportPair, better: str, worse: str) -> str:
    from gpt.evaluation.significance import compare_reports

    if pair.challenger.slice_fingerprint != pair.champion.slice_fingerprint:
        return "not compared: their block sizes divide the slice differently"
    found = compare_reports(pair.challenger, pair.champion)
    if not found.is_significant:
        return f"no significant difference ({found.interval})"
    return f"{better if found.is_significantly_better else worse} ({found.interval})"


def render_result(result: RetrainResult) -> str:
    """Return the result as a Markdown page."""
    return (
        f"# Retraining of {result.name}\n\n{render_table(result.lines)}\n\n"
        f"## Open in Prefect and MLflow\n\n```sh\n{result.prefect_ui}\n{result.mlflow_ui}\n```\n"
    )
