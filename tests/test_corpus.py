"""Parquet to shards: real files in, rows decoded back out of the shards."""

import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt.config import build_config
from gpt.data import corpus
from gpt.data.corpus import (
    TokenizeProgress,
    encode_unit,
    find_dataset,
    find_sources,
    inspect,
    is_validation,
    tokenize_corpus,
    units,
)
from gpt.data.shards import open_shard, verify
from gpt.data.tokenizer import END_OF_TEXT, load_tokenizer
from gpt.errors import CorpusError, GPTError
from gpt.files import sha256_of

TEXTS = [f"Document {i}: <|endoftext|> naïve 東京 🦙 " + "word " * (i % 7) for i in range(300)]


def config(root, source, **data):
    return build_config(
        {
            "run": {"name": "t", "root": str(root)},
            "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8},
            "data": {"source": source, "validation_fraction": 0.1, **data},
            "training": {"batch_size": 1, "grad_acc": 1, "max_steps": 1},
        }
    )


def parquet(path, texts=TEXTS, kind=None, column="text", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pa.array(texts) if kind is None else pa.array(texts, pa.string()).cast(kind)
    table = pa.table({"id": pa.array(range(len(texts)), pa.int64()), column: values})
    pq.write_table(table, path, **options)
    return str(path)


def run(made):
    """All progress and the manifest of a tokenising."""
    progress, generator = [], tokenize_corpus(made)
    while True:
        try:
            progress.append(next(generator))
        except StopIteration as stop:
            return progress, stop.value


def ids_of(manifest, split):
    return np.concatenate([open_shard(manifest.folder / s.name, s) for s in split.shards])


def documents(manifest, split):
    ids = ids_of(manifest, split)
    assert ids[0] == END_OF_TEXT
    pieces = np.split(ids, np.flatnonzero(ids == END_OF_TEXT))[1:]
    return [load_tokenizer().decode(piece[1:].tolist()) for piece in pieces]


def both(manifest):
    return documents(manifest, manifest.train), documents(manifest, manifest.validation)


def test_shards_decode_back_to_the_rows(tmp_path):
    source = parquet(tmp_path / "a.parquet", row_group_size=64)
    progress, manifest = run(config(tmp_path / "runs", source, tokens_per_shard=1_000))
    train, validation = both(manifest)
    held_out = [is_validation(text.encode(), 0.1) for text in TEXTS]
    assert train == [t for t, held in zip(TEXTS, held_out, strict=True) if not held]
    assert validation == [t for t, held in zip(TEXTS, held_out, strict=True) if held]
    assert 10 <= len(validation) <= 60
    assert len(manifest.train.shards) > 3
    assert manifest.train.tokens == sum(s.tokens for s in manifest.train.shards)
    assert (manifest.train.documents, manifest.validation.documents) == (
        len(train),
        len(validation),
    )
    assert manifest.train.text_bytes == sum(len(t.encode()) for t in train)
    assert manifest.folder == tmp_path / "runs" / "datasets" / manifest.fingerprint[:16]
    assert manifest.sources[0].rows == len(TEXTS)
    assert manifest.sources[0].sha256 == sha256_of(Path(source))
    assert isinstance(progress[-1], TokenizeProgress)
    assert progress[-1].rows_done == progress[-1].rows_total == len(TEXTS)
    assert progress[-1].tokens == manifest.train.tokens + manifest.validation.tokens
    verify(manifest)


STRINGS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_every_kind_of_string_gives_the_same_tokens(tmp_path, kind):
    texts = [*TEXTS[:90], "", None]
    plain = run(config(tmp_path / "plain", parquet(tmp_path / "plain.parquet", texts)))[1]
    other = run(config(tmp_path / "other", parquet(tmp_path / "other.parquet", texts, kind)))[1]
    assert other.train.shards == plain.train.shards
    assert other.validation.shards == plain.validation.shards
    assert other.skipped == {"null": 1, "empty": 1}


def test_batches_and_units_do_not_change_the_tokens(tmp_path, monkeypatch):
    source = parquet(tmp_path / "a.parquet", row_group_size=10)
    whole = run(config(tmp_path / "whole", source))[1]
    monkeypatch.setattr(corpus, "UNIT_BYTES", 1_000)
    monkeypatch.setattr(corpus, "BATCH_ROWS", 3)
    progress, pieces = run(config(tmp_path / "pieces", source))
    assert len(progress) > len(TEXTS) / 4
    assert pieces.train.shards == whole.train.shards


def test_units_cover_the_file_and_are_independent(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "UNIT_BYTES", 1_000)
    source = parquet(tmp_path / "a.parquet", row_group_size=30)
    (found,) = inspect(find_sources([source]), "text")
    cut = list(units(found, "text"))
    assert [i for unit in cut for i in unit.groups] == list(range(10))
    assert [unit.first_row for unit in cut] == [30 * unit.groups.start for unit in cut]
    rows = [sum(batch.rows for batch in encode_unit(unit, 0.1)) for unit in reversed(cut)]
    assert sum(rows) == len(TEXTS)


def test_a_document_stays_on_its_side_in_any_order_and_company(tmp_path):
    one = run(config(tmp_path / "1", parquet(tmp_path / "1.parquet", TEXTS[:200])))[1]
    shuffled = [*TEXTS[200:], *reversed(TEXTS[:200])]
    two = run(config(tmp_path / "2", parquet(tmp_path / "2.parquet", shuffled)))[1]
    (train_1, validation_1), (train_2, validation_2) = both(one), both(two)
    assert set(train_1) < set(train_2)
    assert set(validation_1) < set(validation_2)
    assert not set(train_2) & set(validation_2)


def test_files_globs_directories_and_lists(tmp_path):
    names = ["b.parquet", "a.parquet", "deep/er/c.parquet", "plain[1].parquet"]
    for i, name in enumerate(names):
        parquet(tmp_path / "in" / name, TEXTS[i : i + 1])
    (tmp_path / "in" / "notes.txt").write_text("no")
    inside = tmp_path / "in"

    def found(*patterns):
        return [p.relative_to(inside).as_posix() for p in find_sources([*patterns])]

    everything = ["a.parquet", "b.parquet", "deep/er/c.parquet", "plain[1].parquet"]
    assert found(str(inside)) == everything
    assert found(f"{inside}/**/*.parquet") == sorted(everything)
    assert found(f"{inside}/?.parquet") == ["a.parquet", "b.parquet"]
    assert found(f"{inside}/plain[1].parquet") == ["plain[1].parquet"]
    assert found(f"{inside}/de*") == ["deep/er/c.parquet"]
    assert found(f"{inside}/b.parquet", str(inside)) == [
        "b.parquet",
        "a.parquet",
        "deep/er/c.parquet",
        "plain[1].parquet",
    ]


def test_order_of_sources_is_the_order_of_documents(tmp_path):
    a, b = parquet(tmp_path / "a.parquet", TEXTS[:99]), parquet(tmp_path / "b.parquet", TEXTS[99:])
    one = run(config(tmp_path / "runs", [a, b]))[1]
    two = run(config(tmp_path / "runs", [b, a]))[1]
    assert one.folder != two.folder
    assert documents(one, one.train) != documents(two, two.train)
    assert sorted(documents(one, one.train)) == sorted(documents(two, two.train))


# --- reuse ---------------------------------------------------------------------------------------


def test_the_same_again_is_found_and_nothing_read(tmp_path, monkeypatch):
    made = config(tmp_path / "runs", parquet(tmp_path / "a.parquet"))
    assert find_dataset(made) is None
    _, manifest = run(made)
    monkeypatch.setattr(corpus, "sha256_of", None)
    monkeypatch.setattr(corpus, "encode_unit", None)
    assert find_dataset(made) == manifest
    assert run(made) == ([], manifest)


def test_moved_and_touched_sources_are_the_same_data(tmp_path):
    source = parquet(tmp_path / "a.parquet")
    _, manifest = run(config(tmp_path / "runs", source))
    Path(source).rename(tmp_path / "b.parquet")
    os.utime(tmp_path / "b.parquet", ns=(1, 1))
    assert find_dataset(config(tmp_path / "runs", str(tmp_path / "b.parquet"))) == manifest


def test_every_setting_and_byte_that_changes_tokens_changes_the_folder(tmp_path):
    source = parquet(tmp_path / "a.parquet")
    folders = {run(config(tmp_path / "runs", source))[1].folder}
    for change in ({"validation_fraction": 0.2}, {"tokens_per_shard": 1_000}):
        folders.add(run(config(tmp_path / "runs", source, **change))[1].folder)
    parquet(tmp_path / "a.parquet", TEXTS[1:])
    folders.add(run(config(tmp_path / "runs", source))[1].folder)
    assert len(folders) == 4


def test_damaged_and_unfinished_data_sets_are_made_anew(tmp_path, caplog):
    made = config(tmp_path / "runs", parquet(tmp_path / "a.parquet"))
    _, manifest = run(made)
    (manifest.folder / "train-00000.bin").write_bytes(b"short")
    with caplog.at_level(logging.WARNING):
        assert find_dataset(made) is None
    assert "train-00000.bin" in caplog.text
    assert run(made)[1] == manifest
    verify(manifest)
    (manifest.folder / "manifest.json").unlink()
    assert find_dataset(made) is None
    assert run(made)[1] == manifest
    verify(manifest)


def test_a_damaged_memory_of_hashes_is_only_forgotten(tmp_path):
    made = config(tmp_path / "runs", parquet(tmp_path / "a.parquet"))
    _, manifest = run(made)
    for text in ("", "[1]", '{"x": 3}', "{"):
        (tmp_path / "runs/datasets/source-hashes.json").write_text(text)
        assert find_dataset(made) == manifest


def test_left_early_it_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_ROWS", 10)
    made = config(tmp_path / "runs", parquet(tmp_path / "a.parquet"))
    generator = tokenize_corpus(made)
    next(generator)
    assert list((tmp_path / "runs/datasets").glob("*.partial"))
    generator.close()
    left = [path.name for path in (tmp_path / "runs/datasets").iterdir()]
    assert left == ["source-hashes.json"]
    assert find_dataset(made) is None


def test_folders_of_killed_runs_go_when_they_are_old(tmp_path):
    datasets = tmp_path / "runs" / "datasets"
    for name in ("old.partial", "new.partial"):
        (datasets / name).mkdir(parents=True)
    os.utime(datasets / "old.partial", (1, 1))
    run(config(tmp_path / "runs", parquet(tmp_path / "a.parquet")))
    assert [path.name for path in datasets.glob("*.partial")] == ["new.partial"]


# --- errors --------------------------------------------------------------------------------------


def refused(made, *words):
    with pytest.raises(CorpusError) as caught:
        run(made)
    for word in words:
        assert str(word) in str(caught.value)
    assert not list(made.run.root.glob("datasets/*.partial"))
    return caught.value


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("no/such.parquet", "no such file"),
        ("no/such/*.parquet", "matches no file"),
        ("hf://datasets/x/y.parquet", "not on this machine"),
    ],
)
def test_sources_that_name_nothing(tmp_path, source, rule):
    refused(config(tmp_path, source), source, rule)


def test_a_directory_without_parquet(tmp_path):
    refused(config(tmp_path / "runs", str(tmp_path)), tmp_path, "holds no *.parquet")


def test_all_broken_sources_are_told_at_once_before_any_work(tmp_path):
    good = parquet(tmp_path / "good.parquet", compression="none")
    data = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "csv.parquet").write_text("text\nhello\n")
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "footer.parquet").write_bytes(data[:-40] + b"\xff" * 32 + data[-8:])
    parquet(tmp_path / "other.parquet", column="content")
    pq.write_table(pa.table({"text": [1, 2], "body": ["x", "y"]}), tmp_path / "ints.parquet")
    error = refused(config(tmp_path / "runs", str(tmp_path)))
    told = {p.key.rpartition("/")[2]: str(p) for p in error.problems}
    assert set(told) == {path.name for path in tmp_path.glob("*.parquet")} - {"good.parquet"}
    assert "not Parquet" in told["csv.parquet"]
    assert "is empty" in told["empty.parquet"]
    assert "cut short" in told["cut.parquet"]
    assert "damaged" in told["footer.parquet"]
    assert "no such column" in told["other.parquet"]
    assert "content (string)" in told["other.parquet"]
    assert "text (int64)" in told["ints.parquet"]
    assert "body" in told["ints.parquet"]
    assert not (tmp_path / "runs").exists()
    run(config(tmp_path / "runs", good))


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
def test_only_strings_are_text(tmp_path, values):
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    made = config(tmp_path / "runs", str(tmp_path / "a.parquet"))
    refused(made, "a.parquet", "text (", "must hold strings", "no column is text")


def test_a_damaged_page_is_found_while_reading(tmp_path):
    source = parquet(tmp_path / "a.parquet", compression="zstd", write_page_checksum=True)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(data) * 2 // 3
    data[middle : middle + 16] = bytes(16)
    (tmp_path / "a.parquet").write_bytes(data)
    refused(config(tmp_path / "runs", source), "a.parquet", "damaged")


@pytest.mark.parametrize("texts", [[], [None, None], ["", None, ""]])
def test_nothing_to_train_on(tmp_path, texts):
    source = parquet(tmp_path / "a.parquet", texts, pa.string())
    nulls = texts.count(None)
    refused(config(tmp_path / "runs", source), "no row has text", f"{nulls} null")


def test_an_empty_split_names_the_setting(tmp_path):
    source = parquet(tmp_path / "a.parquet", TEXTS[:20])
    refused(
        config(tmp_path / "1", source, validation_fraction=1e-9), "raise data.validation_fraction"
    )
    refused(
        config(tmp_path / "2", source, validation_fraction=1 - 1e-9),
        "lower data.validation_fraction",
    )


@pytest.mark.parametrize("batch_rows", [1, 100])
def test_text_that_is_not_utf8_is_told_by_its_row(tmp_path, monkeypatch, batch_rows):
    monkeypatch.setattr(corpus, "BATCH_ROWS", batch_rows)
    raw = pa.array([b"fine", b"caf\xe9 au lait"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    made = config(tmp_path / "runs", str(tmp_path / "a.parquet"))
    refused(made, "a.parquet = row 1", "not UTF-8 at its byte 3")


def test_a_source_changed_meanwhile_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_ROWS", 100)
    made = config(tmp_path / "runs", parquet(tmp_path / "a.parquet"))
    generator = tokenize_corpus(made)
    next(generator)
    os.utime(tmp_path / "a.parquet", ns=(1, 1))
    with pytest.raises(GPTError, match="changed while it was read"):
        list(generator)
