"""How many tokens the data has, without reading a row: from an existing dataset, otherwise from
file sizes. (Reading Parquet metadata would import pyarrow, which takes a second.)"""

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config.schema import RunConfig

BYTES_PER_TOKEN = 2.0
"""Of compressed Parquet with FineWeb's columns: 1.6 in a sample of it, about 2.8 in its
sample-10BT, 1.1 for novels and manuals. So the estimate is right within a factor of two."""
MAX_TOKENS_PER_BYTE = 8
"""Repetitive text compresses further than BYTES_PER_TOKEN; a file never holds more than this."""


@dataclass(frozen=True)
class DataEstimate:
    """Tokens of both splits; None if the sources are not on this machine."""

    train_tokens: int | None
    validation_tokens: int | None
    basis: str
    exact: bool
    missing: tuple[str, ...] = ()
    """Local sources that match no file."""
    source_bytes: int = 0

    @property
    def max_train_tokens(self) -> int | None:
        """An upper bound of `train_tokens`."""
        if self.train_tokens is None or self.exact:
            return self.train_tokens
        return self.source_bytes * MAX_TOKENS_PER_BYTE


def estimate_data(config: RunConfig) -> DataEstimate:
    """Look for the sources and for a dataset that was made from them."""
    local = {source: _find_files(source) for source in config.data.source if "://" not in source}
    missing = tuple(source for source, files in local.items() if not files)
    if missing:
        return DataEstimate(None, None, "n/a: the sources do not exist", False, missing)
    if len(local) < len(set(config.data.source)):
        return DataEstimate(None, None, "n/a: the sources are not on this machine", False)
    sizes = {path.name: path.stat().st_size for files in local.values() for path in files}
    for manifest in newest_first(config.run.root / "datasets", "*/manifest.json"):
        if found := _from_manifest(manifest, config, sizes):
            return found
    total = sum(sizes.values())
    tokens = round(total / BYTES_PER_TOKEN)
    validation = round(tokens * config.data.validation_fraction)
    basis = (
        f"estimated within a factor of two: {total:,} bytes of Parquet at {BYTES_PER_TOKEN:g} "
        "bytes per token"
    )
    return DataEstimate(tokens - validation, validation, basis, False, source_bytes=total)


def newest_first(folder: Path, pattern: str) -> list[Path]:
    """Return the matches below a folder, newest first; none if the folder cannot exist."""
    try:
        return sorted(folder.glob(pattern), key=lambda path: -path.stat().st_mtime)
    except (OSError, ValueError):  # e.g. a name that is too long or holds a NUL
        return []


def _find_files(source: str) -> list[Path]:
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(below for below in path.rglob("*.parquet") if below.is_file())
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
    except (OSError, ValueError, RuntimeError):  # e.g. a NUL in a path, no such home
        return []
    return [file for match in matches if match != str(path) for file in _find_files(match)]


def _from_manifest(path: Path, config: RunConfig, sizes: Mapping[str, int]) -> DataEstimate | None:
    """Return the counts of a dataset made from files of these names and sizes in the same way."""
    try:
        manifest: Any = json.loads(path.read_bytes())
        made_from = {Path(s["path"]).name: s["size_bytes"] for s in manifest["sources"]}
        same = (
            made_from == sizes
            and manifest["text_column"] == config.data.text_column
            and manifest["validation_fraction"] == config.data.validation_fraction
        )
        train, validation = (int(manifest[split]["tokens"]) for split in ("train", "validation"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    basis = f"counted: {path.parent} was made from these files"
    return DataEstimate(train, validation, basis, True) if same else None
