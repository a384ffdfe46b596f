"""What a retraining came to, in words."""

from __future__ import annotations

from flows.outcome import Outcome
from gpt.artifacts import Artifact, EvaluationReport
from tasks.evaluate_slices import Slices


class Text(Artifact):
    """Tokens of a data set, by where they come from."""

    tokenised: int
    """By this retraining."""
    reused: int
    """Of units that other data sets had."""


class Retrained(Artifact):
    """`outcome` is None where there was nothing to do."""

    name: str
    reason: str
    """Why there was something to do, or nothing."""
    notes: tuple[str, ...] = ()
    start: str = ""
    text: Text | None = None
    champion: str = ""
    """The one that was held against; empty: there was none."""
    outcome: Outcome | None = None
    slices: Slices | None = None
    look_prefect: str
    look_mlflow: str

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
    report: EvaluationReport, slices: Slices | None, champion: str
) -> list[tuple[str, str]]:
    if slices is None:
        return [("current slice", f"challenger {report.loss:.4f}")]
    theirs = slices.champion
    told = [
        (
            "current slice",
            f"challenger {report.loss:.4f}, {champion} {theirs.loss:.4f} (loss over "
            f"{report.tokens:,} tokens)",
        )
    ]
    if slices.old and slices.champion_old:
        told.append(
            (
                "old slice",
                f"challenger {slices.old.loss:.4f}, {champion} {slices.champion_old.loss:.4f}: "
                + _forgetting(slices.old, slices.champion_old),
            )
        )
        if slices.old.slice_fingerprint == report.slice_fingerprint:
            rule = (
                "both slices are the same text, because the new files come behind the first "
                f"{report.tokens:,} validation tokens; a larger evaluation.tokens reaches them"
            )
            told.append(("note", rule))
    return told


def _forgetting(ours: EvaluationReport, theirs: EvaluationReport) -> str:
    from gpt.evaluation.difference import difference

    if ours.slice_fingerprint != theirs.slice_fingerprint:
        return "not compared, because other block sizes cut it at another place"
    found = difference(ours, theirs)
    if found.low is None or found.high is None:
        return found.basis
    interval = f"95% interval {found.low:+.4f} to {found.high:+.4f}, {found.basis}"
    if not found.is_real:
        return f"nothing forgotten beyond chance ({interval})"
    return f"better there too ({interval})" if found.is_better else f"forgotten some ({interval})"


def page(done: Retrained) -> str:
    """As Markdown."""
    rows = "\n".join(f"| {name} | {_cell(text)} |" for name, text in done.lines)
    look = f"```sh\n{done.look_prefect}\n{done.look_mlflow}\n```"
    return f"# Retraining of {done.name}\n\n| | |\n|---|---|\n{rows}\n\n## Look at it\n\n{look}\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
