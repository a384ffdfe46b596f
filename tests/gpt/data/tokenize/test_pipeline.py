"""Parquet to shards: real files are tokenized, and the shards are decoded to rows."""

import logging
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_data import (
    TEXTS,
    build_dataset,
    decode_all,
    decode_documents,
    decode_splits,
    make_config,
    reference_ids,
    stored_ids,
    tokenize_with_progress,
    write_parquet,
)

from gpt.data import parquet as parquet_files
from gpt.data import sources
from gpt.data.filters import RowFilter
from gpt.data.shards import verify_shards
from gpt.data.sources import find_sources
from gpt.data.tokenize import chunks, pipeline, pool, units
from gpt.data.tokenize.chunks import is_validation
from gpt.data.tokenize.pipeline import TokenizeProgress, find_dataset, tokenize_corpus
from gpt.files import compute_sha256


def test_shards_decode_to_the_rows(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", row_group_size=64)
    progress, manifest = tokenize_with_progress(
        make_config(tmp_path / "runs", source, tokens_per_shard=1_000)
    )
    train, validation = decode_splits(manifest)
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
    assert manifest.sources[0].sha256 == compute_sha256(Path(source))
    assert isinstance(progress[-1], TokenizeProgress)
    assert progress[-1].rows_done == progress[-1].rows_total == len(TEXTS)
    assert progress[-1].tokens == manifest.train.tokens + manifest.validation.tokens
    verify_shards(manifest)


STRINGS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_string()),
]


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_every_string_type_gives_the_same_tokens(tmp_path, kind):
    texts = [*TEXTS[:90], "", None]
    plain = tokenize_with_progress(
        make_config(tmp_path / "plain", write_parquet(tmp_path / "plain.parquet", texts))
    )[1]
    other = tokenize_with_progress(
        make_config(tmp_path / "other", write_parquet(tmp_path / "other.parquet", texts, kind))
    )[1]
    assert other.train.shards == plain.train.shards
    assert other.validation.shards == plain.validation.shards
    assert other.skipped == {"null": 1, "empty": 1}


def test_shards_hold_the_ids_of_tiktoken(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", row_group_size=64)
    assert stored_ids(build_dataset(tmp_path / "runs", source)) == reference_ids(TEXTS)


def test_tokens_do_not_depend_on_batch_chunk_unit_or_shard_size(tmp_path, monkeypatch):
    texts = [*TEXTS, "one long text, " * 400, "東京。" * 700, "x" * 3_000]
    source = write_parquet(tmp_path / "a.parquet", texts, row_group_size=101)
    monkeypatch.setattr(units, "UNIT_BYTES", 1_000)
    monkeypatch.setattr(parquet_files, "BATCH_ROWS", 3)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 500)
    progress, pieces = tokenize_with_progress(
        make_config(tmp_path / "pieces", source, tokens_per_shard=1_000)
    )
    assert len(progress) > len(TEXTS) / 10
    assert stored_ids(pieces) == reference_ids(texts)
    lengths = [len(pipeline.tokenizer.encode(text)) for text in texts]
    bins = [sum(n.bit_length() == bits for n in lengths) for bits in range(20)]
    assert [*pieces.document_lengths, *[0] * 20][:20] == bins


def test_units_are_row_groups_or_parts_of_large_ones():
    def cut(*groups):
        found = list(units.split_into_units(groups))
        return [(u.rows.start, u.rows.stop, u.groups.start, u.groups.stop) for u in found]

    mega = 1_000_000
    assert cut((10, mega), (10, mega)) == [(0, 20, 0, 2)]
    assert cut((10, 9 * mega), (10, 9 * mega), (5, 1)) == [(0, 20, 0, 2), (20, 25, 2, 3)]
    large = cut((3, 1), (4, 64 * mega), (2, 1))
    assert large == [
        (0, 3, 0, 1),
        *[(i, i + 1, 1, 2) for i in range(3, 7)],
        (7, 9, 2, 3),
    ]
    assert cut((1, 900 * mega)) == [(0, 1, 0, 1)]


def test_units_are_read_together_or_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 900)
    monkeypatch.setattr(parquet_files, "BATCH_ROWS", 7)
    selection = RowFilter("text")
    source = write_parquet(tmp_path / "a.parquet", row_group_size=90)
    (found,) = [parquet_files.inspect_parquet(f, selection) for f in find_sources([source])]
    assert len(found.units) > 10

    def texts(wanted):
        rows = list(parquet_files.read_rows(found, wanted, selection))
        return [str(text, "utf-8") for row in rows for text in row.texts]

    assert texts(found.units) == TEXTS
    assert [t for unit in found.units for t in texts([unit])] == TEXTS
    some = [found.units[1], found.units[3], found.units[-1]]
    assert texts(some) == [TEXTS[row] for unit in some for row in unit.rows]


@pytest.mark.parametrize("workers", [2, 4])
def test_tokens_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(pipeline, "TEXT_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 700)
    source = write_parquet(tmp_path / "a.parquet", row_group_size=64)
    dataset = build_dataset(tmp_path / "runs", source, workers=workers)
    assert stored_ids(dataset) == reference_ids(TEXTS)


# --- filters and sources --------------------------------------------------------------------------


def hive(folder):
    for year, language in ((2023, "en"), (2024, "en"), (2024, "de")):
        place = folder / f"year={year}" / f"language={language}"
        texts = [f"{year} {language} number {i}" for i in range(40)]
        write_parquet(place / "part.parquet", texts)


def test_where_uses_columns_and_hive_partitions(tmp_path):
    hive(tmp_path / "in")
    dataset = build_dataset(
        tmp_path / "runs",
        str(tmp_path / "in"),
        where="year >= 2024 AND language = 'en' AND id < 30",
    )
    assert decode_all(dataset) == sorted(f"2024 en number {i}" for i in range(30))
    assert dataset.skipped == {"null": 0, "empty": 0, "where": 90}
    assert dataset.settings["where"].startswith("year")


def test_partition_values_change_the_fingerprint(tmp_path):
    hive(tmp_path / "in")
    where = {"where": "language = 'en'"}
    before = build_dataset(tmp_path / "runs", str(tmp_path / "in"), **where)
    (tmp_path / "in/year=2024/language=de").rename(tmp_path / "in/year=2024/language=en2")
    (tmp_path / "in/year=2024/language=en").rename(tmp_path / "in/year=2024/language=fr")
    after = build_dataset(tmp_path / "runs", str(tmp_path / "in"), **where)
    assert before.folder != after.folder
    assert decode_all(after) == sorted(f"2023 en number {i}" for i in range(40))


def test_where_treats_null_as_false(tmp_path):
    table = pa.table({"text": [f"text {i}" for i in range(60)], "score": [None, 0.5, 0.95] * 20})
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = build_dataset(tmp_path / "runs", str(tmp_path / "a.parquet"), where="score > 0.9")
    assert decode_all(dataset) == sorted(f"text {i}" for i in range(2, 60, 3))
    assert dataset.skipped["where"] == 40


def test_lengths_count_characters(tmp_path):
    texts = ["é" * n for n in range(1, 41) for _ in range(3)]
    source = write_parquet(tmp_path / "a.parquet", texts)
    dataset = build_dataset(tmp_path / "runs", source, min_length=5, max_length=30)
    assert decode_all(dataset) == sorted(text for text in texts if 5 <= len(text) <= 30)
    assert dataset.skipped == {"null": 0, "empty": 0, "short": 12, "long": 30}


def test_exact_duplicates_are_dropped_across_files(tmp_path):
    a = write_parquet(tmp_path / "a.parquet", [*TEXTS[:80], *TEXTS[:80], TEXTS[0] + " "])
    b = write_parquet(tmp_path / "b.parquet", TEXTS[40:120])
    dataset = build_dataset(tmp_path / "runs", [a, b], drop_duplicates=True)
    assert stored_ids(dataset) == reference_ids([*TEXTS[:80], TEXTS[0] + " ", *TEXTS[80:120]])
    assert dataset.skipped["duplicate"] == 120
    assert not list(dataset.folder.glob("seen*"))


@pytest.mark.parametrize("most", [1_000, 1_777, 2_345])
def test_max_tokens_is_a_limit_and_keeps_documents_complete(tmp_path, monkeypatch, most):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 90)
    texts = [text * (1 + i % 3) for i, text in enumerate(TEXTS)]
    dataset = build_dataset(
        tmp_path / "runs", write_parquet(tmp_path / "a.parquet", texts), max_tokens=most
    )
    sizes = [1 + len(pipeline.tokenizer.encode(text)) for text in texts]
    fitting = max(n for n in range(len(texts)) if sum(sizes[:n]) <= most)
    assert stored_ids(dataset) == reference_ids(texts[:fitting])
    assert dataset.skipped["max_tokens"] == len(texts) - fitting
    verify_shards(dataset)


def test_sources_at_fsspec_addresses(tmp_path):
    import fsspec

    source = write_parquet(tmp_path / "a.parquet")
    memory = fsspec.filesystem("memory")
    for name in ("one", "two"):
        memory.pipe(f"/bucket/{tmp_path.name}/{name}.parquet", Path(source).read_bytes())
    address = f"memory://bucket/{tmp_path.name}"
    for pattern in (address, f"{address}/*.parquet"):
        dataset = build_dataset(tmp_path / "runs", pattern)
        assert stored_ids(dataset) == reference_ids(TEXTS * 2)
    single = build_dataset(tmp_path / "runs", f"{address}/one.parquet")
    assert stored_ids(single) == reference_ids(TEXTS)


# --- order and splits ----------------------------------------------------------------------------


def test_split_depends_on_the_document_alone(tmp_path):
    one = tokenize_with_progress(
        make_config(tmp_path / "1", write_parquet(tmp_path / "1.parquet", TEXTS[:200]))
    )[1]
    shuffled = [*TEXTS[200:], *reversed(TEXTS[:200])]
    two = tokenize_with_progress(
        make_config(tmp_path / "2", write_parquet(tmp_path / "2.parquet", shuffled))
    )[1]
    (train_1, validation_1), (train_2, validation_2) = decode_splits(one), decode_splits(two)
    assert set(train_1) < set(train_2)
    assert set(validation_1) < set(validation_2)
    assert not set(train_2) & set(validation_2)


def test_sources_are_files_globs_directories_or_lists(tmp_path):
    names = ["b.parquet", "a.parquet", "deep/er/c.parquet", "plain[1].parquet"]
    for i, name in enumerate(names):
        write_parquet(tmp_path / "in" / name, TEXTS[i : i + 1])
    (tmp_path / "in" / "notes.txt").write_text("no")
    inside = tmp_path / "in"

    def found(*patterns):
        return [Path(f.name).relative_to(inside).as_posix() for f in find_sources(patterns)]

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


def test_documents_are_in_the_order_of_the_sources(tmp_path):
    a, b = (
        write_parquet(tmp_path / "a.parquet", TEXTS[:99]),
        write_parquet(tmp_path / "b.parquet", TEXTS[99:]),
    )
    one = tokenize_with_progress(make_config(tmp_path / "runs", [a, b]))[1]
    two = tokenize_with_progress(make_config(tmp_path / "runs", [b, a]))[1]
    assert one.folder != two.folder
    assert decode_documents(one, one.train) != decode_documents(two, two.train)
    assert sorted(decode_documents(one, one.train)) == sorted(decode_documents(two, two.train))


# --- reuse ---------------------------------------------------------------------------------------


def test_existing_dataset_is_found_without_reading_sources(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "a.parquet")
    time.sleep(2 * sources.SETTLED_SECONDS)
    config = make_config(tmp_path / "runs", source)
    assert find_dataset(config) is None
    _, manifest = tokenize_with_progress(config)
    monkeypatch.setattr(sources, "compute_sha256", None)
    monkeypatch.setattr(parquet_files, "inspect_parquet", None)
    monkeypatch.setattr(pipeline, "open_pool", None)
    assert find_dataset(config) == manifest
    assert tokenize_with_progress(config) == ([], manifest)


def test_hash_of_a_file_just_written_is_not_cached(tmp_path):
    config = make_config(tmp_path / "runs", write_parquet(tmp_path / "a.parquet"))
    os.utime(tmp_path / "a.parquet")
    find_dataset(config)
    assert not (tmp_path / "runs/datasets/source-hashes.json").exists()


def test_changed_byte_with_restored_mtime_is_detected(tmp_path):
    source = Path(write_parquet(tmp_path / "a.parquet", TEXTS, compression="none"))
    before = build_dataset(tmp_path / "runs", str(source))
    status = source.stat()
    data = source.read_bytes()
    source.write_bytes(data.replace(b"Document 7:", b"Document 8:"))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = build_dataset(tmp_path / "runs", str(source))
    assert after.folder != before.folder
    assert stored_ids(after) == reference_ids(
        [t.replace("Document 7:", "Document 8:") for t in TEXTS]
    )


def test_moved_or_touched_sources_give_the_same_dataset(tmp_path):
    source = write_parquet(tmp_path / "a.parquet")
    _, manifest = tokenize_with_progress(make_config(tmp_path / "runs", source))
    Path(source).rename(tmp_path / "b.parquet")
    os.utime(tmp_path / "b.parquet", ns=(1, 1))
    assert find_dataset(make_config(tmp_path / "runs", str(tmp_path / "b.parquet"))) == manifest


def test_settings_and_bytes_change_the_folder(tmp_path):
    source = write_parquet(tmp_path / "a.parquet")
    folders = {tokenize_with_progress(make_config(tmp_path / "runs", source))[1].folder}
    for change in ({"validation_fraction": 0.2}, {"tokens_per_shard": 1_000}):
        folders.add(
            tokenize_with_progress(make_config(tmp_path / "runs", source, **change))[1].folder
        )
    write_parquet(tmp_path / "a.parquet", TEXTS[1:])
    folders.add(tokenize_with_progress(make_config(tmp_path / "runs", source))[1].folder)
    assert len(folders) == 4


def record_encoded(monkeypatch):
    """Record the texts that are encoded from now on."""
    seen, encode = [], pool.encode_chunk

    def spy(encoder, chunk):
        seen.append(chunk.text)
        return encode(encoder, chunk)

    monkeypatch.setattr(pool, "encode_chunk", spy)
    return seen


def alter(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing": Path.unlink,
    "short": lambda path: os.truncate(path, path.stat().st_size - 2),
    "altered": alter,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_only_the_damaged_shard_is_rebuilt(tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setattr(units, "UNIT_BYTES", 2_000)
    source = write_parquet(tmp_path / "a.parquet", row_group_size=20)
    config = make_config(tmp_path / "runs", source, tokens_per_shard=1_000)
    _, manifest = tokenize_with_progress(config)
    DAMAGES[kind](manifest.folder / "train-00002.bin")
    with caplog.at_level(logging.WARNING):
        assert find_dataset(config) is None
    assert "train-00002.bin" in caplog.text
    encoded = record_encoded(monkeypatch)
    assert tokenize_with_progress(config)[1] == manifest
    verify_shards(manifest)
    assert 0 < len(b"".join(encoded)) < sum(len(t.encode()) for t in TEXTS) / 2


def test_folder_without_manifest_is_rebuilt(tmp_path):
    config = make_config(tmp_path / "runs", write_parquet(tmp_path / "a.parquet"))
    _, manifest = tokenize_with_progress(config)
    (manifest.folder / "manifest.json").unlink()
    assert find_dataset(config) is None
    assert tokenize_with_progress(config)[1] == manifest
    verify_shards(manifest)


def test_only_units_of_changed_files_are_encoded(tmp_path, monkeypatch):
    places = [
        write_parquet(tmp_path / f"{i}.parquet", TEXTS[i * 60 : i * 60 + 60]) for i in range(5)
    ]
    build_dataset(tmp_path / "runs", places)
    encoded = record_encoded(monkeypatch)
    changed = [f"new {text}" for text in TEXTS[120:180]]
    write_parquet(tmp_path / "2.parquet", changed)
    after = build_dataset(tmp_path / "runs", places)
    assert stored_ids(after) == reference_ids([*TEXTS[:120], *changed, *TEXTS[180:]])
    assert b"".join(encoded) == "".join(changed).encode()
    encoded.clear()
    fewer = build_dataset(tmp_path / "runs", [*places[3:], *places[:2]], tokens_per_shard=1_000)
    assert stored_ids(fewer) == reference_ids([*TEXTS[180:], *TEXTS[:120]])
    assert not encoded


def test_drop_duplicates_reencodes_everything_after_a_change(tmp_path, monkeypatch):
    places = [
        write_parquet(tmp_path / f"{i}.parquet", TEXTS[i * 50 : i * 50 + 60]) for i in range(5)
    ]
    build_dataset(tmp_path / "runs", places, drop_duplicates=True)
    encoded = record_encoded(monkeypatch)
    write_parquet(tmp_path / "3.parquet", [*TEXTS[:10], *TEXTS[160:200]])
    after = build_dataset(tmp_path / "runs", places, drop_duplicates=True)
    kept = [*TEXTS[:160], *TEXTS[160:200], *TEXTS[200:260]]
    assert stored_ids(after) == reference_ids(kept)
    assert b"".join(encoded) == "".join(TEXTS[160:260]).encode()


def test_damaged_hash_cache_is_ignored(tmp_path):
    config = make_config(tmp_path / "runs", write_parquet(tmp_path / "a.parquet"))
    _, manifest = tokenize_with_progress(config)
    for text in ("", "[1]", '{"x": 3}', "{"):
        (tmp_path / "runs/datasets/source-hashes.json").write_text(text)
        assert find_dataset(config) == manifest


def test_interrupted_build_keeps_finished_units(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 2_000)
    source = write_parquet(tmp_path / "a.parquet", row_group_size=20)
    config = make_config(tmp_path / "runs", source, tokens_per_shard=1_000)
    generator = tokenize_corpus(config)
    done = [next(generator) for _ in range(5)][-1]
    generator.close()
    assert find_dataset(config) is None
    (left,) = (tmp_path / "runs/datasets").glob("*.partial")
    assert not (left / "manifest.json").exists()
    encoded = record_encoded(monkeypatch)
    progress, manifest = tokenize_with_progress(config)
    assert stored_ids(manifest) == reference_ids(TEXTS)
    assert progress[0].rows_reused >= 40
    assert progress[0].rows_reused <= done.rows_done
    texts = TEXTS[progress[0].rows_reused :]
    assert b"".join(encoded) == "".join(texts).encode()
    assert not list((tmp_path / "runs/datasets").glob("*.partial"))


def test_units_that_differ_from_the_journal_are_encoded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 2_000)
    config = make_config(
        tmp_path / "runs", write_parquet(tmp_path / "a.parquet", row_group_size=20)
    )
    generator = tokenize_corpus(config)
    for _ in range(5):
        next(generator)
    generator.close()
    (left,) = (tmp_path / "runs/datasets").glob("*.partial")
    path = left / "train-00000.bin.partial"
    data = bytearray(path.read_bytes())
    data[1_500] ^= 1
    path.write_bytes(data)
    assert stored_ids(tokenize_with_progress(config)[1]) == reference_ids(TEXTS)


def test_old_unfinished_folders_are_deleted(tmp_path):
    datasets = tmp_path / "runs" / "datasets"
    for name in ("old.partial", "new.partial"):
        (datasets / name).mkdir(parents=True)
    os.utime(datasets / "old.partial", (1, 1))
    tokenize_with_progress(make_config(tmp_path / "runs", write_parquet(tmp_path / "a.parquet")))
    assert [path.name for path in datasets.glob("*.partial")] == ["new.partial"]
