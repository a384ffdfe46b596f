"""A corpus of real text that needs no network: the docstrings of installed Python packages.

Source files are parsed, never imported. The same installed packages give the same bytes.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gpt.data.tokenize import tokenizer
from gpt.errors import CorpusError, Problem
from gpt.files import atomic_file

MIN_BYTES = 10_000_000
TARGET_BYTES = 13_000_000
"""Collecting stops at this much text: enough for a first run, and written in seconds."""
MIN_DOCUMENT_BYTES = 300
MIN_DOCSTRING_FRACTION = 0.4
"""Modules with fewer docstrings are skipped: they take most of the parsing time."""
MAX_SOURCE_BYTES = 400_000
"""Longer modules are generated tables and API clients."""
ROW_GROUP_ROWS = 200
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SKIPPED_FOLDERS = {"_vendor", "dist-packages", "site-packages", "test", "tests"}


def write_sample_corpus(
    path: Path, *, target_bytes: int = TARGET_BYTES, libraries: Sequence[Path] | None = None
) -> tuple[int, int]:
    """Write a Parquet file with FineWeb's columns, one document per module, atomically. Returns the
    number of documents and their bytes of text.

    Reads `libraries` (default: the standard library, then site-packages) until `target_bytes` of
    UTF-8 are collected. Rows are sorted by id, a hash, so that topics mix. Raises `CorpusError` if
    less than `MIN_BYTES` (or `target_bytes`, if smaller) is found.
    """
    rows: list[dict[str, Any]] = []
    text_bytes = 0
    for name, file_path, text in read_documents(libraries or find_libraries()):
        rows.append(
            {
                "text": text,
                "id": hashlib.blake2b(f"{name}\0{text}".encode(), digest_size=16).hexdigest(),
                "dump": "python-docs",
                "url": f"pydoc:{name}",
                "date": "",
                "file_path": file_path,
                "language": "en",
                "language_score": 1.0,
                "token_count": tokenizer.encode(text).size,
            }
        )
        text_bytes += len(text.encode())
        if text_bytes >= target_bytes:
            break
    if text_bytes < (needed := min(target_bytes, MIN_BYTES)):
        rule = f"the installed packages must have at least {needed} bytes of docstrings"
        remedy = "install overnight with all of its dependencies, or use your own Parquet files"
        raise CorpusError(Problem("sample corpus", f"{text_bytes} bytes", rule, remedy))
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: row["id"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        pq.write_table(table, partial, row_group_size=ROW_GROUP_ROWS, compression="zstd")
    return len(rows), text_bytes


def find_libraries() -> list[Path]:
    """The folders of the standard library and of site-packages."""
    paths = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
    return [Path(path) for path in dict.fromkeys(paths)]


def read_documents(libraries: Sequence[Path]) -> Iterator[tuple[str, str, str]]:
    """Yield (module, source file, text) for every well-documented module, in a fixed order that
    mixes packages. No docstring is used twice."""
    seen: set[str] = set()
    for library in libraries:
        paths = [path.relative_to(library) for path in library.rglob("*.py")]
        paths = [path for path in paths if not SKIPPED_FOLDERS.intersection(path.parts)]
        for path in sorted(paths, key=lambda path: hashlib.sha256(bytes(path)).digest()):
            name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
            source = (library / path).read_bytes()
            text = "\n\n\n".join([name, *_read_docstrings(source, seen)])
            if len(text.encode()) >= MIN_DOCUMENT_BYTES:
                yield name, path.as_posix(), text


def _read_docstrings(source: bytes, seen: set[str]) -> Iterator[str]:
    """Yield new docstrings in source order, each below the signature of its class or function."""
    documented = sum(map(len, source.split(b'"""')[1::2])) / max(1, len(source))
    if len(source) > MAX_SOURCE_BYTES or documented < MIN_DOCSTRING_FRACTION:
        return
    text = source.decode("utf-8", errors="ignore")
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # Python 2, templates
        return
    lines = text.split("\n")
    for node in [tree, *_definitions(tree)]:
        docstring = (ast.get_docstring(node) or "").encode("utf-8", errors="ignore").decode()
        if docstring and docstring not in seen:
            seen.add(docstring)
            signature = slice(0)
            if not isinstance(node, ast.Module):
                signature = slice(node.lineno - 1, node.body[0].lineno - 1)
            yield "\n".join([*(line.strip() for line in lines[signature]), docstring])


def _definitions(node: ast.Module | Definition) -> Iterator[Definition]:
    """Yield classes and functions in source order, including nested ones."""
    for child in node.body:
        if isinstance(child, Definition):
            yield child
            yield from _definitions(child)
