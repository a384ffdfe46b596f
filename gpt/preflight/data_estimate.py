"""What can be known of the data before a row is read: from a data set made earlier, else from the
size of the files. Parquet's own figures would take pyarrow, and that a second."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config.schema import RunConfig

BYTES_PER_TOKEN = 2.0
"""Of compressed Parquet with FineWeb's columns: 1.6 in a sample of it, some 2.8 in its sample-10BT,
1.1 where the text is novels and manuals. So an estimate is right within a factor of two."""
MOST_TOKENS_PER_BYTE = 8
"""Text that is one page over and over compresses further; more than this is taken for certain."""


@dataclass(frozen=True)
class DataEstimate:
    """Tokens of both sides. None: the sources are not here."""

    train_tokens: int | None
    validation_tokens: int | None
    basis: str
    exact: bool
    missing: tuple[str, ...] = ()
    """Sources that name nothing on this machine."""
    source_bytes: int = 0

    @property
    def most_train_tokens(self) -> int | None:
        """What the training side certainly does not pass."""
        if self.train_tokens is None or self.exact:
            return self.train_tokens
        return self.source_bytes * MOST_TOKENS_PER_BYTE


def estimate_data(config: RunConfig) -> DataEstimate:
    files: dict[Path, None] = {}
    missing, elsewhere = [], 0
    for source in config.data.source:
        found = [] if "://" in source else _files(source)
        files |= dict.fromkeys(found)
        elsewhere += "://" in source
        if not found and "://" not in source:
            missing.append(source)
    if missing:
        return DataEstimate(None, None, "n/a: the sources are not here", False, tuple(missing))
    if elsewhere:
        return DataEstimate(None, None, "n/a: the sources are not on this machine", False)
    sizes = {path.name: path.stat().st_size for path in files}
    for manifest in newest_first(config.run.root / "datasets", "*/manifest.json"):
        facts = _from_manifest(manifest, config, sizes)
        if facts:
            return facts
    total = sum(sizes.values())
    tokens = round(total / BYTES_PER_TOKEN)
    validation = round(tokens * config.data.validation_fraction)
    basis = (
        f"estimated: {total:,} bytes of Parquet at {BYTES_PER_TOKEN:g} a token, give or take half"
    )
    return DataEstimate(tokens - validation, validation, basis, False, source_bytes=total)


def newest_first(folder: Path, pattern: str) -> list[Path]:
    """What matches below a folder; nothing where there is no such folder, or can be none."""
    try:
        return sorted(folder.glob(pattern), key=lambda path: -path.stat().st_mtime)
    except (OSError, ValueError):  # a name too long, a NUL in it
        return []


def _files(source: str) -> list[Path]:
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(below for below in path.rglob("*.parquet") if below.is_file())
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    except (OSError, ValueError, RuntimeError):  # a NUL in a path, no such home
        return []
    return [file for match in matches if match != str(path) for file in _files(match)]


def _from_manifest(path: Path, config: RunConfig, sizes: Mapping[str, int]) -> DataEstimate | None:
    """The facts of a data set that was made from files of these names and sizes in this way."""
    try:
        manifest: Any = json.loads(path.read_bytes())
        made_from = {Path(s["path"]).name: s["size_bytes"] for s in manifest["sources"]}
        same = (
            made_from == sizes
            and manifest["text_column"] == config.data.text_column
            and manifest["validation_fraction"] == config.data.validation_fraction
        )
        train, validation = (int(manifest[side]["tokens"]) for side in ("train", "validation"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    basis = f"counted: {path.parent} was made from these files"
    return DataEstimate(train, validation, basis, True) if same else None
