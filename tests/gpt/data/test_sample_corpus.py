"""The sample corpus: docstrings of installed packages, parsed and never executed."""

from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from gpt.data import sample_corpus
from gpt.data.sample_corpus import find_libraries, read_documents, write_sample_corpus
from gpt.data.tokenize.tokenizer import load_tokenizer
from gpt.errors import CorpusError

COLUMNS = [
    *("text", "id", "dump", "url", "date"),
    *("file_path", "language", "language_score", "token_count"),
]
PROSE = "A sentence about {0}, which is long enough that its module is worth a document. " * 5

MODULE = '''"""{module}"""
raise SystemExit("documentation is read, not executed")

class Greeter(Base, metaclass=Meta):
    """{greeter}"""

    def greet(self, name: str = "you", *,
              loud=False) -> None:
        """{greet}"""
        def inner():
            """{inner}"""

def bare():
    pass
'''


def module(name):
    keys = ("module", "greeter", "greet", "inner")
    return MODULE.format(**{key: PROSE.format(f"{name} {key}") for key in keys})


@pytest.fixture
def library(tmp_path):
    root = tmp_path / "library"
    files = {
        "greetings/__init__.py": module("package"),
        "greetings/polite.py": module("polite"),
        "copied.py": module("polite"),
        "first_line.py": f'def first():\n    """{PROSE}"""\n',
        "tiny.py": '"""Says little."""\n',
        "python2.py": f'print "no"\n"""{PROSE}"""\n',
        "surrogate.py": '"""' + "\\ud800" + "x" * 500 + '"""',
        "tests/test_greetings.py": module("test"),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_documents_hold_docstrings_below_their_signatures(library):
    found = {name: (path, text) for name, path, text in read_documents([library])}
    polite = {"greetings.polite", "copied"} & set(found)
    assert set(found) == {"greetings", "first_line", "surrogate", *polite}
    assert len(polite) == 1, "one of two equal modules"
    path, text = found["greetings"]
    assert path == "greetings/__init__.py"
    lines = [line for line in text.splitlines() if line and not line.startswith("A sentence")]
    assert lines == [
        "greetings",
        "class Greeter(Base, metaclass=Meta):",
        'def greet(self, name: str = "you", *,',
        "loud=False) -> None:",
        "def inner():",
    ]
    assert found["first_line"][1].splitlines()[3] == "def first():"


def test_the_file_has_fineweb_columns_and_correct_counts(tmp_path):
    path = tmp_path / "new" / "sample.parquet"
    documents, text_bytes = write_sample_corpus(path, target_bytes=1_000_000)
    table = pq.read_table(path)
    assert table.column_names == COLUMNS
    rows = table.to_pylist()
    assert len(rows) == documents > 5
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == len(rows)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert text_bytes == sum(len(row["text"].encode()) for row in rows) >= 1_000_000
    encode = load_tokenizer().encode_ordinary
    assert [row["token_count"] for row in rows] == [len(encode(row["text"])) for row in rows]
    assert all(not row["file_path"].startswith("/") for row in rows)
    assert [p.name for p in path.parent.iterdir()] == ["sample.parquet"]


def test_bytes_do_not_depend_on_the_order_of_directory_entries(tmp_path, monkeypatch):
    rglob = Path.rglob

    def shuffled(folder, pattern):
        paths = list(rglob(folder, pattern))
        Random().shuffle(paths)
        return iter(paths)

    write_sample_corpus(tmp_path / "1.parquet", target_bytes=1_000_000)
    monkeypatch.setattr(Path, "rglob", shuffled)
    write_sample_corpus(tmp_path / "2.parquet", target_bytes=1_000_000)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


def test_row_groups_are_small(tmp_path, library, monkeypatch):
    monkeypatch.setattr(sample_corpus, "ROW_GROUP_ROWS", 3)
    path = tmp_path / "a.parquet"
    documents, _ = write_sample_corpus(path, target_bytes=4_000, libraries=[library])
    metadata = pq.ParquetFile(path).metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(groups) == documents
    assert max(groups) == 3


def test_too_little_documentation_is_an_error_and_writes_no_file(tmp_path, library):
    with pytest.raises(CorpusError, match="10000000 bytes"):
        write_sample_corpus(tmp_path / "a.parquet", libraries=[library])
    assert not list(tmp_path.glob("*.parquet"))


def test_libraries_are_those_of_this_environment():
    libraries = find_libraries()
    assert any((library / "json" / "decoder.py").is_file() for library in libraries)
    assert any((library / "tiktoken" / "core.py").is_file() for library in libraries)
