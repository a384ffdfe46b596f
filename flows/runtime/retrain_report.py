"""What a retraining came to, in words."""

from __future__ import annotations

from flows.runtime.outcome import Outcome
from gpt.artifacts import Artifact, EvaluationReport
from tasks.evaluate_slices import ReportPair, SliceReports


class TokenCounts(Artifact):
    """Tokens of a data set, by where they come from."""

    tokenised: int
    """By this retraining."""
    reused: int
    """Of units that other data sets had."""


class RetrainResult(Artifact):
    """`outcome` is None where there was nothing to do."""

    name: str
    reason: str
    """Why there was something to do, or nothing."""
    notes: tuple[str, ...] = ()
    start: str = ""
    text: TokenCounts | None = None
    champion: str = ""
    """The one that was held against; empty: there was none."""
    outcome: Outcome | None = None
    slices: SliceReports | None = None
    prefect_ui: str
    mlflow_ui: str

    def __str__(self) -> str:
        return "; ".join(f"{name}: {text}" for name, text in self.lines)

    @property
    def lines(self) -> list[tuple[str, str]]:
        """What there is to tell, each under its heading."""
        told = [("source", self.reason), *(("note", note) for note in self.notes)]
        if self.text:
            reused = f"{self.text.reused:,} reused"
            told.append(("tokens", f"{self.text.tokenised:,} tokenised, {reused}"))
        if self.outcome is None:
            return told
        trained = f"{self.outcome.report.step:,} steps, {self.outcome.tokens_seen:,} tokens"
        begun = f"from {self.start}" if self.start != "scratch" else "from scratch"
        told.append(("challenger", f"trained {begun}: {trained}"))
        told += _on_slices(self.outcome.report, self.slices, self.champion)
        told.append(("verdict", str(self.outcome.registered or "not yet: MLflow was away")))
        told.append(("run", str(self.outcome.folder)))
        return told


def _on_slices(
    report: EvaluationReport, slices: SliceReports | None, champion: str
) -> list[tuple[str, str]]:
    over = f"loss over {report.tokens:,} tokens"
    if slices is None:
        return [("current slice", f"challenger {report.loss:.4f} ({over})")]
    told = [("current slice", f"{_losses(slices.current, champion)} ({over})")]
    for name, pair, words in (
        ("old slice", slices.old, ("better there too", "forgotten some")),
        ("new text", slices.new, ("learned", "worse there too")),
    ):
        if pair:
            told.append((name, f"{_losses(pair, champion)}: {_told(pair, *words)}"))
    if slices.old and slices.old.challenger.slice_fingerprint == report.slice_fingerprint:
        rule = (
            "the current slice is the old one, because new text comes behind the first "
            f"{report.tokens:,} validation tokens; a larger evaluation.tokens would reach it"
        )
        told.append(("note", rule))
    return told


def _losses(pair: ReportPair, champion: str) -> str:
    return f"challenger {pair.challenger.loss:.4f}, {champion} {pair.champion.loss:.4f}"


def _told(pair: ReportPair, better: str, worse: str) -> str:
    from gpt.evaluation.significance import compare_reports

    if pair.challenger.slice_fingerprint != pair.champion.slice_fingerprint:
        return "not compared, because other block sizes cut it at another place"
    found = compare_reports(pair.challenger, pair.champion)
    if found.low is None or found.high is None:
        return found.basis
    interval = f"95% interval {found.low:+.4f} to {found.high:+.4f}, {found.basis}"
    if not found.is_significant:
        return f"no difference beyond chance ({interval})"
    return f"{better if found.is_significantly_better else worse} ({interval})"


def page(done: RetrainResult) -> str:
    """As Markdown."""
    rows = "\n".join(f"| {name} | {_cell(text)} |" for name, text in done.lines)
    look = f"```sh\n{done.prefect_ui}\n{done.mlflow_ui}\n```"
    return f"# Retraining of {done.name}\n\n| | |\n|---|---|\n{rows}\n\n## Look at it\n\n{look}\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
