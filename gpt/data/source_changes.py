"""What changed in a config's source since a dataset was built."""

from gpt.artifacts import Artifact, DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.tokenize.plan import FILTER_SETTINGS, make_plan


class SourceChanges(Artifact):
    """Files are compared by the hash of their bytes, so a renamed file is not a change."""

    fingerprint: str
    """Fingerprint of the dataset that the source gives now."""
    new: tuple[str, ...]
    """Names of files whose bytes are not in the earlier dataset."""
    removed: tuple[str, ...]
    """Earlier names of files whose bytes are no longer in the source."""
    settings: tuple[str, ...] = ()
    """Changed settings of [data] that select or split documents differently, as sentences."""
    known: tuple[str, ...] = ()
    """SHA-256 of the unchanged files; empty if settings changed."""

    @property
    def any(self) -> bool:
        """Whether there is text that the earlier model was not trained on."""
        return bool(self.new or self.settings)


def find_source_changes(config: RunConfig, before: DatasetManifest | None) -> SourceChanges:
    """Compare the config's source with the dataset `before`; None means that everything is new.

    Hashes only files whose size or times changed. Raises `CorpusError` if nothing matches the
    source.
    """
    plan = make_plan(config)
    current = {identity.sha256: file.name for file, identity in plan.identities.by_file.items()}
    earlier = {source.sha256: source.path for source in before.sources} if before else {}
    settings = _find_changed_settings(config, before) if before else ()
    return SourceChanges(
        fingerprint=plan.fingerprint,
        new=tuple(name for sha256, name in current.items() if sha256 not in earlier),
        removed=tuple(name for sha256, name in earlier.items() if sha256 not in current),
        settings=settings,
        known=() if settings else tuple(sha256 for sha256 in current if sha256 in earlier),
    )


def _find_changed_settings(config: RunConfig, before: DatasetManifest) -> tuple[str, ...]:
    data = config.data
    earlier = {
        "text_column": before.text_column,
        "validation_fraction": before.validation_fraction,
        **{name: before.settings.get(name) for name in FILTER_SETTINGS},
    }
    return tuple(
        f"data.{name} is {getattr(data, name) or 'not set'} and was {value or 'not set'}"
        for name, value in earlier.items()
        # A setting at its default may be missing from the manifest.
        if (getattr(data, name) or None) != (value or None)
    )
