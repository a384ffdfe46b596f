"""Unusable input: each kind gives one clear message with the file, the place and the remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_data import (
    TEXTS,
    build_dataset,
    decode_all,
    make_config,
    reference_ids,
    stored_ids,
    tokenize_with_progress,
    write_parquet,
)

from gpt.data import parquet as parquet_files
from gpt.data.tokenize import units
from gpt.data.tokenize.pipeline import tokenize_corpus
from gpt.errors import CorpusError


def assert_refused(made, *words):
    with pytest.raises(CorpusError) as caught:
        tokenize_with_progress(made)
    for word in words:
        assert str(word) in str(caught.value)
    assert not list(made.run.root.glob("datasets/*/manifest.json"))
    return caught.value


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("no/such.parquet", "no such file"),
        ("no/such/*.parquet", "matches no files"),
        ("memory://no/such.parquet", "nothing exists at this URL"),
        ("nosuchscheme://x/y.parquet", "fsspec cannot open"),
    ],
)
def test_sources_that_match_nothing_are_refused(tmp_path, source, rule):
    assert_refused(make_config(tmp_path, source), source, rule)


def test_a_directory_without_parquet_is_refused(tmp_path):
    assert_refused(make_config(tmp_path / "runs", str(tmp_path)), tmp_path, "has no *.parquet")


def test_all_broken_sources_are_reported_at_once_before_any_work(tmp_path):
    good = write_parquet(tmp_path / "good.parquet", compression="none")
    data = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "csv.parquet").write_text("text\nhello\n")
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "footer.parquet").write_bytes(data[:-40] + b"\xff" * 32 + data[-8:])
    write_parquet(tmp_path / "other.parquet", column="content")
    pq.write_table(pa.table({"text": [1, 2], "body": ["x", "y"]}), tmp_path / "ints.parquet")
    error = assert_refused(make_config(tmp_path / "runs", str(tmp_path)))
    messages = {p.key.rpartition("/")[2]: str(p) for p in error.problems}
    assert set(messages) == {path.name for path in tmp_path.glob("*.parquet")} - {"good.parquet"}
    assert "not Parquet" in messages["csv.parquet"]
    assert "is empty" in messages["empty.parquet"]
    assert "truncated" in messages["cut.parquet"]
    assert "damaged" in messages["footer.parquet"]
    assert "no such column" in messages["other.parquet"]
    assert "content (string)" in messages["other.parquet"]
    assert "text (int64)" in messages["ints.parquet"]
    assert "body" in messages["ints.parquet"]
    assert not (tmp_path / "runs").exists()
    tokenize_with_progress(make_config(tmp_path / "runs", good))


@pytest.mark.parametrize(
    "values",
    [
        pa.array([b"x"]),
        pa.array([b"x"]).cast(pa.large_binary()),
        pa.array([["x"]]),
        pa.array([1.5]),
        pa.array([None], pa.null()),
        pa.array([1]).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_a_text_column_must_hold_strings(tmp_path, values):
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    made = make_config(tmp_path / "runs", str(tmp_path / "a.parquet"))
    assert_refused(made, "a.parquet", "text (", "must hold strings", "no column holds text")


def test_a_damaged_page_is_found_while_reading(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", compression="zstd", write_page_checksum=True)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(data) * 2 // 3
    data[middle : middle + 16] = bytes(16)
    (tmp_path / "a.parquet").write_bytes(data)
    assert_refused(make_config(tmp_path / "runs", source), "a.parquet", "row group 0", "damaged")


@pytest.mark.parametrize("texts", [[None, None], ["", None, ""]])
def test_a_file_without_text_is_refused_beside_good_ones(tmp_path, texts):
    good = write_parquet(tmp_path / "good.parquet")
    source = write_parquet(tmp_path / "a.parquet", texts, pa.string())
    nulls = texts.count(None)
    made = make_config(tmp_path / "runs", [good, source])
    assert_refused(made, "a.parquet", "no row has text", f"{nulls} null")
    write_parquet(tmp_path / "a.parquet", [], pa.string())
    assert_refused(made, "a.parquet", "has no rows")


def test_a_filter_that_leaves_no_rows_is_refused(tmp_path):
    source = write_parquet(tmp_path / "a.parquet")
    assert_refused(
        make_config(tmp_path / "runs", source, where="id < 0"), "no row is left", "300 where"
    )
    assert_refused(
        make_config(tmp_path / "runs", source, max_tokens=1), "no row is left", "max_tokens"
    )


@pytest.mark.parametrize(
    ("where", "rule"),
    [
        ("id >", "polars cannot read it"),
        ("id > AVG(id)", "one row at a time"),
        ("COUNT(*) > 3 AND id > 1", "one row at a time"),
        ("ROW_NUMBER() OVER (ORDER BY id) > 3", "one row at a time"),
        ("id > (SELECT 1)", "one row at a time"),
        ("id + 1", "must be true or false"),
        ("text > 3", "polars cannot evaluate it"),
        ("language = 'en'", "has no column language"),
    ],
)
def test_invalid_conditions_are_refused(tmp_path, where, rule):
    assert_refused(
        make_config(tmp_path / "runs", write_parquet(tmp_path / "a.parquet"), where=where), rule
    )


def test_dangling_links_and_pipes_are_refused(tmp_path, monkeypatch):
    inside = tmp_path / "in"
    write_parquet(inside / "good.parquet")
    (inside / "link.parquet").symlink_to("gone.parquet")
    os.mkfifo(inside / "pipe.parquet")
    error = assert_refused(
        make_config(tmp_path / "runs", str(inside)), "link.parquet", "link to gone.parquet"
    )
    assert "not a regular file" in str(error)
    assert_refused(
        make_config(tmp_path / "runs", str(inside / "link.parquet")), "link to gone.parquet"
    )


def test_an_empty_split_names_the_setting(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", TEXTS[:20])
    assert_refused(
        make_config(tmp_path / "1", source, validation_fraction=1e-9),
        "raise data.validation_fraction",
    )
    assert_refused(
        make_config(tmp_path / "2", source, validation_fraction=1 - 1e-9),
        "lower data.validation_fraction",
    )


@pytest.mark.parametrize("batch_rows", [1, 100])
def test_text_that_is_not_utf8_is_reported_with_its_row(tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr(parquet_files, "BATCH_ROWS", batch_rows)
    raw = pa.array([b"fine", b"caf\xe9 au lait"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    made = make_config(tmp_path / "runs", str(tmp_path / "a.parquet"))
    assert_refused(made, "a.parquet = row 1", "not UTF-8 at byte 3")


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 1_000)
    made = make_config(tmp_path / "runs", write_parquet(tmp_path / "a.parquet"))
    generator = tokenize_corpus(made)
    next(generator)
    os.utime(tmp_path / "a.parquet", ns=(1, 1))
    with pytest.raises(CorpusError, match="changed while it was read"):
        list(generator)


# --- on_bad_file = "skip" ------------------------------------------------------------------------


def bad_files(folder):
    """Write one bad file of each kind, named after its fault."""
    plain = Path(
        write_parquet(folder / "tmp", compression="none", write_page_checksum=True)
    ).read_bytes()
    (folder / "tmp").unlink()
    (folder / "not-parquet.parquet").write_text("text\nhello\n")
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "cut.parquet").write_bytes(plain[: len(plain) // 2])
    middle = len(plain) // 2
    (folder / "pages.parquet").write_bytes(plain[:middle] + bytes(64) + plain[middle + 64 :])
    write_parquet(folder / "column.parquet", column="content")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "type.parquet")
    raw = pa.array([b"fine", b"caf\xe9 au lait"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": broken}), folder / "utf8.parquet")
    write_parquet(folder / "no-rows.parquet", [], pa.string())
    write_parquet(folder / "nulls.parquet", [None, None], pa.string())
    (folder / "dangling.parquet").symlink_to("gone")


def test_bad_files_are_skipped_counted_and_named(tmp_path):
    inside = tmp_path / "in"
    write_parquet(inside / "good.parquet")
    bad_files(inside)
    made = build_dataset(tmp_path / "runs", str(inside), on_bad_file="skip")
    assert stored_ids(made) == reference_ids(TEXTS)
    bad = {path.name for path in inside.iterdir()} - {"good.parquet"}
    assert {Path(file.path).name for file in made.skipped_files} == bad
    assert all(file.reason for file in made.skipped_files)
    assert build_dataset(tmp_path / "runs", str(inside), on_bad_file="skip") == made
    with pytest.raises(CorpusError) as caught:
        tokenize_with_progress(make_config(tmp_path / "runs", str(inside)))
    assert {Path(p.key).name for p in caught.value.problems} == bad - {
        "pages.parquet",
        "utf8.parquet",
        "nulls.parquet",
    }


def test_skipping_every_file_is_an_error(tmp_path):
    bad_files(tmp_path)
    assert_refused(
        make_config(tmp_path / "runs", str(tmp_path), on_bad_file="skip"), "utf8.parquet = row 1"
    )


# --- text is stored unchanged ---------------------------------------------------------------------


def test_text_is_stored_unchanged(tmp_path):
    texts = ["a\r\nb\rc", "\0nul\0", "\ufeffmark", "e\u0301 é", "  spaces  ", "\n\n", "\x85\u2028"]
    texts += [
        "ﬁ Å Å",
        "\U000e0001tag",
        "a" * 5_000,
        "=" * 3_000,
        "\t" * 2_000 + "x",
        "\ud7ff\ue000",
    ]
    made = build_dataset(
        tmp_path / "runs", write_parquet(tmp_path / "a.parquet", texts), validation_fraction=0.5
    )
    assert decode_all(made) == sorted(texts)
    assert stored_ids(made) == reference_ids(texts, 0.5)


def test_enum_and_json_columns_are_text(tmp_path):
    names = [f"value {i}" for i in range(200)]
    write_parquet(tmp_path / "a.parquet", names, pa.dictionary(pa.int32(), pa.string()))
    table = pa.table({"text": pa.array([f'"{n}"' for n in names], pa.json_())})
    pq.write_table(table, tmp_path / "json.parquet")
    made = build_dataset(tmp_path / "runs", str(tmp_path))
    assert decode_all(made) == sorted([*names, *(f'"{n}"' for n in names)])


# --- the disk ------------------------------------------------------------------------------------

FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))
sys.path.insert(0, "tests/helpers")
from corpus_data import build_dataset
from gpt.errors import DatasetError
try:
    build_dataset(sys.argv[1], sys.argv[2])
except DatasetError as error:
    print(error)
"""


def test_a_full_disk_is_a_message_and_nothing_looks_complete(tmp_path):
    source = write_parquet(tmp_path / "a.parquet")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "runs"), source],
        capture_output=True,
        text=True,
        check=True,
        # Python does not notice when the limit cuts the compiled file of a module that it imports.
        env=os.environ | {"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "the disk is full" in done.stdout
    assert "run again" in done.stdout
    assert not list((tmp_path / "runs/datasets").glob("*/manifest.json"))
    assert stored_ids(build_dataset(tmp_path / "runs", source)) == reference_ids(TEXTS)
