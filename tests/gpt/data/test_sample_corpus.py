"""The sample corpus: documentation that is installed, parsed and never executed."""

import os
import random

import pyarrow.parquet as pq
import pytest

from gpt.data import sample_corpus
from gpt.data.sample_corpus import collect, installed_libraries, write_sample_corpus
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

    def greet(self, name: str = "you", *, loud=False) -> None:
        """{greet}"""
        def inner():
            """{inner}"""

def bare():
    pass
'''


def module(name):
    return MODULE.format(
        **{key: PROSE.format(f"{name} {key}") for key in ("module", "greeter", "greet", "inner")}
    )


@pytest.fixture
def library(tmp_path):
    root = tmp_path / "library"
    files = {
        "pydoc_data/topics.py": f"topics = {{'while': {PROSE!r}, 'assert': {PROSE[1:]!r}}}",
        "greetings/__init__.py": module("package"),
        "greetings/polite.py": module("polite"),
        "copied.py": module("polite"),
        "tiny.py": '"""Says little."""\n',
        "python2.py": 'print "no"\n',
        "surrogate.py": '"""' + "\\ud800" + "x" * 500 + '"""',
        "tests/test_greetings.py": module("test"),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_documents_are_topics_and_modules_with_headings(library):
    found = {document.name: document for document in collect([library])}
    polite_text = {"greetings.polite", "copied"} & set(found)
    assert set(found) == {"topic.while", "topic.assert", "greetings", *polite_text}
    assert len(polite_text) == 1, "one of two equal modules"
    assert found["topic.while"].text == PROSE.strip()
    assert found["greetings"].file_path == "greetings/__init__.py"
    lines = found["greetings"].text.splitlines()
    headings = [line for line in lines if line and not line.startswith("A sentence")]
    assert headings == [
        "greetings",
        "class Greeter(Base)",
        "Greeter.greet(self, name: str='you', *, loud=False) -> None",
        "Greeter.greet.inner()",
    ]


def test_the_file_has_fineweb_s_columns_and_true_counts(tmp_path):
    path = tmp_path / "new" / "sample.parquet"
    made = write_sample_corpus(path, target_bytes=1_000_000)
    table = pq.read_table(path)
    assert table.column_names == COLUMNS
    rows = table.to_pylist()
    assert len(rows) == made.documents > 5
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == len(rows)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    assert made.text_bytes == sum(len(row["text"].encode()) for row in rows) >= 1_000_000
    assert made.tokens == sum(row["token_count"] for row in rows)
    encoding = load_tokenizer()
    assert rows[3]["token_count"] == len(encoding.encode_ordinary(rows[3]["text"]))
    assert all(not row["file_path"].startswith("/") for row in rows)
    assert any("assert" in row["url"] for row in rows)
    assert [p.name for p in path.parent.iterdir()] == ["sample.parquet"]


def test_the_same_bytes_whatever_order_the_disk_gives(tmp_path, monkeypatch):
    walk = os.walk

    def shuffled(top):
        for folder, folders, files in walk(top):
            random.shuffle(folders)
            random.shuffle(files)
            yield folder, folders, files

    write_sample_corpus(tmp_path / "1.parquet", target_bytes=1_000_000)
    monkeypatch.setattr(os, "walk", shuffled)
    write_sample_corpus(tmp_path / "2.parquet", target_bytes=1_000_000)
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()


def test_row_groups_are_small(tmp_path, library, monkeypatch):
    monkeypatch.setattr(sample_corpus, "ROW_GROUP_ROWS", 3)
    made = write_sample_corpus(tmp_path / "a.parquet", target_bytes=4_500, libraries=[library])
    metadata = pq.ParquetFile(tmp_path / "a.parquet").metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sum(groups) == made.documents
    assert max(groups) == 3


def test_too_little_documentation_is_an_error_and_no_file(tmp_path, library):
    with pytest.raises(CorpusError, match="10000000 bytes"):
        write_sample_corpus(tmp_path / "a.parquet", libraries=[library])
    assert not list(tmp_path.glob("*.parquet"))


def test_the_libraries_are_this_environment_s():
    libraries = installed_libraries()
    assert any((library / "json" / "decoder.py").is_file() for library in libraries)
    assert any((library / "tiktoken" / "core.py").is_file() for library in libraries)
