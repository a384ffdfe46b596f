"""What of a config's source is new, held against the data set of a model that is there already."""

from __future__ import annotations

from gpt.artifacts import Artifact, DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.tokenize.plan import make_plan

SELECTING = ("where", "min_length", "max_length", "drop_duplicates", "max_tokens")


class SourceChanges(Artifact):
    """Files are told apart by the hash of their bytes: another name is no change."""

    fingerprint: str
    """Of the data set that the source makes now."""
    new: tuple[str, ...]
    """Names of files whose bytes the earlier data set does not have."""
    removed: tuple[str, ...]
    """Names, of then, of files whose bytes the source does not have any more."""
    settings: tuple[str, ...] = ()
    """Settings of [data] that select other documents than then, in words."""
    known: tuple[str, ...] = ()
    """SHA-256 of the files that both have, where the settings are the same."""

    @property
    def any(self) -> bool:
        """Whether there is something to train on that the earlier model has not seen."""
        return bool(self.new or self.settings)


def find_source_changes(config: RunConfig, before: DatasetManifest | None) -> SourceChanges:
    """Of the config's source since the data set `before`; None: all is new.

    Hashes only what it does not know by size and times. Raises `CorpusError` for a source that
    names nothing.
    """
    plan = make_plan(config)
    plan.identities.save()
    now = {identity.sha256: file.name for file, identity in plan.identities.by_file.items()}
    then = {source.sha256: source.path for source in before.sources} if before else {}
    settings = changed_settings(config, before) if before else ()
    return SourceChanges(
        fingerprint=plan.fingerprint,
        new=tuple(name for sha256, name in now.items() if sha256 not in then),
        removed=tuple(name for sha256, name in then.items() if sha256 not in now),
        settings=settings,
        known=() if settings else tuple(sha256 for sha256 in now if sha256 in then),
    )


def changed_settings(config: RunConfig, before: DatasetManifest) -> tuple[str, ...]:
    """Those that select or divide documents otherwise. How the tokens are cut into shards does
    not."""
    data = config.data
    then = {
        "text_column": before.text_column,
        "validation_fraction": before.validation_fraction,
        **{name: before.settings.get(name) for name in SELECTING},
    }
    return tuple(
        f"data.{name} is {_shown(getattr(data, name))} and was {_shown(value)}"
        for name, value in then.items()
        # Left at its default a setting may be missing, as in a manifest of before it.
        if (getattr(data, name) or None) != (value or None)
    )


def _shown(value: object) -> str:
    return str(value) if value else "not set"
