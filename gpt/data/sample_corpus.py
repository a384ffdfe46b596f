"""A real corpus that every machine already has: the documentation of installed packages.

The Python manual's topics and the docstrings of the standard library and of site-packages, one
document a topic or module, in a Parquet file with FineWeb's columns. Source files are parsed,
never imported or executed. The same installed files give the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gpt.data.tokenize import tokenizer
from gpt.errors import CorpusError, Problem
from gpt.files import PARTIAL

MINIMUM_BYTES = 10_000_000
TARGET_BYTES = 13_000_000
"""Text at which collecting ends: enough for a first run, seconds to make."""
DOCUMENT_BYTES = 300
"""Shorter documents say too little."""
DOCUMENTED_SHARE = 0.4
"""Modules of which at least this share stands in triple quotes come first: they give three times
as much text for a second of parsing."""
LARGEST_SOURCE_BYTES = 400_000
"""Longer modules are generated tables and clients."""
ROW_GROUP_ROWS = 200
NO_DOCUMENTATION = frozenset(
    {"__pycache__", "_vendor", "dist-packages", "site-packages", "test", "tests"}
)
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("id", pa.string()),
        ("dump", pa.string()),
        ("url", pa.string()),
        ("date", pa.string()),
        ("file_path", pa.string()),
        ("language", pa.string()),
        ("language_score", pa.float64()),
        ("token_count", pa.int64()),
    ]
)

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SampleCorpus:
    """What was written. `tokens` without end-of-texts."""

    path: Path
    documents: int
    text_bytes: int
    tokens: int


@dataclass(frozen=True)
class Document:
    name: str
    """As `json.decoder` or `topic.assert`."""
    file_path: str
    """The source file, relative to its library's folder."""
    text: str

    @property
    def id(self) -> str:
        name_and_text = f"{self.name}\0{self.text}".encode()
        return hashlib.blake2b(name_and_text, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Module:
    library: Path
    path: Path

    @property
    def file_path(self) -> str:
        return self.path.relative_to(self.library).as_posix()

    @property
    def name(self) -> str:
        parts = list(self.path.relative_to(self.library).with_suffix("").parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)


def write_sample_corpus(
    path: Path, *, target_bytes: int = TARGET_BYTES, libraries: Sequence[Path] | None = None
) -> SampleCorpus:
    """Write the corpus to `path`, whole or not at all.

    Collects until `target_bytes` of UTF-8 are there, from `libraries` or else the standard library
    and site-packages. Rows stand in the order of their ids, which are hashes, so that domains mix.
    Raises `CorpusError` when less than 10 MB (or `target_bytes`, if that is less) can be found.
    """
    roots = tuple(libraries) if libraries is not None else installed_libraries()
    documents: list[Document] = []
    text_bytes = 0
    for document in collect(roots):
        documents.append(document)
        text_bytes += len(document.text.encode())
        if text_bytes >= target_bytes:
            break
    needed = min(target_bytes, MINIMUM_BYTES)
    if text_bytes < needed:
        rule = f"installed packages must hold {needed} bytes of documentation"
        remedy = "install all of overnight's dependencies with their sources, or bring a corpus"
        raise CorpusError(Problem("sample corpus", f"{text_bytes} bytes", rule, remedy))
    documents.sort(key=lambda document: document.id)
    return SampleCorpus(path, len(documents), text_bytes, _write(path, documents))


def installed_libraries() -> tuple[Path, ...]:
    """The folders of the standard library and of site-packages."""
    paths = [sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib")]
    return tuple(Path(path) for path in dict.fromkeys(paths))


def collect(libraries: Sequence[Path]) -> Iterator[Document]:
    """Documents in order of worth: the manual's topics, well documented modules library by
    library, then all others. No text comes twice, and no docstring."""
    seen: set[bytes] = set()
    sparse: list[Module] = []
    for library in libraries:
        yield from _topics(library, seen)
        for module in modules(library):
            source = _read(module.path)
            if documented_share(source) < DOCUMENTED_SHARE:
                sparse.append(module)
            elif document := _document(module, source, seen):
                yield document
    for module in sparse:
        if document := _document(module, _read(module.path), seen):
            yield document


def modules(library: Path) -> list[Module]:
    """Every source file below, in an order that mixes packages and is always the same."""
    found = []
    for folder, folders, files in os.walk(library):
        folders[:] = [f for f in folders if f not in NO_DOCUMENTATION and not f.startswith(".")]
        found += [Module(library, Path(folder, name)) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda module: (_digest(module.file_path), module.file_path))


def documented_share(source: bytes) -> float:
    """About how much of a source stands in triple quotes, found without parsing it."""
    return sum(map(len, source.split(b'"""')[1::2])) / max(1, len(source))


def _read(path: Path) -> bytes:
    """The source, or nothing where it is too long or cannot be read."""
    try:
        return path.read_bytes() if path.stat().st_size <= LARGEST_SOURCE_BYTES else b""
    except OSError:
        return b""


def _topics(library: Path, seen: set[bytes]) -> Iterator[Document]:
    """The language reference as `help()` shows it: one dictionary in one module."""
    path = library / "pydoc_data" / "topics.py"
    tree = _parsed(path.read_bytes()) if path.is_file() else None
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in sorted(ast.literal_eval(node.value).items()):
                if _is_new(text := value.strip(), seen):
                    yield Document(f"topic.{key}", path.relative_to(library).as_posix(), text)


def _document(module: Module, source: bytes, seen: set[bytes]) -> Document | None:
    tree = _parsed(source)
    if not tree:
        return None
    sections = [doc for doc in [_docstring(tree)] if doc and _is_new(doc, seen)]
    for heading, doc in _definitions(tree, ""):
        if _is_new(doc, seen):
            sections.append(f"{heading}\n\n{doc}")
    text = "\n\n\n".join([module.name, *sections])
    if len(text.encode()) < DOCUMENT_BYTES:
        return None
    return Document(module.name, module.file_path, text)


def _parsed(source: bytes) -> ast.Module | None:
    """The tree of a source, or nothing: Python 2 and templates lie about in packages too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _definitions(node: ast.Module | Definition, prefix: str) -> Iterator[tuple[str, str]]:
    """Heading and docstring of classes and functions, outer before inner, in source order."""
    for child in node.body:
        if isinstance(child, Definition):
            name = f"{prefix}{child.name}"
            if doc := _docstring(child):
                yield _heading(child, name), doc
            yield from _definitions(child, f"{name}.")


def _heading(node: Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({ast.unparse(node.args)}){returns}"


def _docstring(node: ast.Module | Definition) -> str:
    """Cleaned of its indentation; empty where there is none or where it is not valid Unicode."""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    return text if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text) else ""


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = _digest(text)
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _digest(text: str) -> bytes:
    """File names may hold bytes that are not UTF-8, which Python reads as surrogates."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _write(path: Path, documents: Sequence[Document]) -> int:
    """Write row group by row group; the tokens of all texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    tokens = 0
    try:
        with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
            for start in range(0, len(documents), ROW_GROUP_ROWS):
                table = _table(documents[start : start + ROW_GROUP_ROWS])
                writer.write_table(table)
                tokens += sum(table["token_count"].to_pylist())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return tokens


def _table(documents: Iterable[Document]) -> pa.Table:
    rows = [
        {
            "text": document.text,
            "id": document.id,
            "dump": "python-docs",
            "url": f"pydoc:{document.name}",
            "date": "",
            "file_path": document.file_path,
            "language": "en",
            "language_score": 1.0,
            "token_count": tokenizer.encode(document.text).size,
        }
        for document in documents
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)
