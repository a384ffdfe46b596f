"""Shards and manifests: what is written can be read, and damage is detected."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from gpt.artifacts import DatasetManifest, Shard, Split
from gpt.data.shards import ShardWriter, open_shard, read_manifest, verify_shards, write_manifest
from gpt.errors import DatasetError


def write(folder, ids, capacity, split="train", pieces=1):
    with ShardWriter(folder, split, capacity) as writer:
        for piece in np.array_split(ids, pieces):
            writer.write(piece)
        return writer.close()


@pytest.fixture
def manifest(tmp_path):
    ids = np.arange(2_500, dtype=np.uint32)
    train = write(tmp_path, ids, 1_000)
    validation = write(tmp_path, ids[:10], 1_000, "validation")
    made = DatasetManifest(
        fingerprint="f" * 64,
        folder=tmp_path,
        tokenizer="gpt2",
        ranks_sha256="0" * 64,
        text_column="text",
        validation_fraction=0.1,
        sources=(),
        train=Split(shards=train, documents=1, tokens=2_500, text_bytes=1),
        validation=Split(shards=validation, documents=1, tokens=10, text_bytes=1),
        skipped={"null": 0, "empty": 0},
    )
    write_manifest(made)
    return made


@pytest.mark.parametrize("pieces", [1, 3, 700])
@pytest.mark.parametrize("capacity", [1, 7, 999, 1_000, 5_000])
def test_ids_are_read_back_for_every_shard_size(tmp_path, pieces, capacity):
    ids = np.random.default_rng(0).integers(0, 65_536, 1_000, dtype=np.uint32)[: capacity * 20]
    shards = write(tmp_path, ids, capacity, pieces=pieces)
    read = [open_shard(tmp_path / shard.name, shard) for shard in shards]
    assert np.array_equal(np.concatenate(read), ids)
    assert [shard.tokens for shard in shards[:-1]] == [capacity] * (len(shards) - 1)
    assert 1 <= shards[-1].tokens <= capacity
    assert sorted(p.name for p in tmp_path.iterdir()) == [shard.name for shard in shards]
    for shard in shards:
        assert hashlib.sha256((tmp_path / shard.name).read_bytes()).hexdigest() == shard.sha256


def test_shards_have_the_format_of_llm_c(tmp_path):
    (shard,) = write(tmp_path, np.array([1, 258, 50256]), 10)
    data = (tmp_path / "train-00000.bin").read_bytes()
    assert shard.name == "train-00000.bin"
    header = [int.from_bytes(data[4 * i : 4 * i + 4], "little", signed=True) for i in range(256)]
    assert header == [20240520, 1, 3] + [0] * 253
    assert data[1024:] == bytes([1, 0, 2, 1, 0x50, 0xC4])


@pytest.mark.parametrize("wrong", [-1, 65_536])
def test_ids_that_would_wrap_are_refused(tmp_path, wrong):
    with ShardWriter(tmp_path, "train", 10) as writer, pytest.raises(ValueError, match="65535"):
        writer.write(np.array([5, wrong]))


def test_an_interrupted_writer_leaves_no_shard(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path, "train", 10) as writer:
            writer.write(np.arange(13))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.glob("*.bin")] == ["train-00000.bin"]
    assert len(list(tmp_path.glob("*.partial"))) == 1


def test_no_ids_give_no_shard(tmp_path):
    assert write(tmp_path, np.array([], dtype=np.uint32), 10) == ()


def test_open_shard_is_memory_mapped_and_read_only(tmp_path):
    (shard,) = write(tmp_path, np.arange(10), 10)
    ids = open_shard(tmp_path / shard.name, shard)
    assert isinstance(ids, np.memmap)
    assert ids.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def damage(path, kind):
    data = bytearray(path.read_bytes())
    match kind:
        case "missing":
            path.unlink()
            return
        case "short":
            data = data[:-2]
        case "long":
            data += b"\0\0"
        case "empty":
            data = bytearray()
        case "magic":
            data[0] ^= 1
        case "count":
            data[8] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["missing", "short", "long", "empty", "magic", "count"])
def test_open_shard_refuses_a_file_that_differs_from_the_manifest(manifest, kind):
    shard = manifest.train.shards[1]
    path = manifest.folder / shard.name
    open_shard(path, shard)
    damage(path, kind)
    with pytest.raises(DatasetError, match=r"train-00001\.bin"):
        open_shard(path, shard)


def test_open_shard_compares_the_token_count_with_the_manifest(manifest):
    shard = manifest.train.shards[0]
    other = Shard(name=shard.name, tokens=shard.tokens - 1, sha256=shard.sha256)
    with pytest.raises(DatasetError, match="999 tokens"):
        open_shard(manifest.folder / shard.name, other)


def test_a_moved_dataset_can_be_read(manifest, tmp_path):
    assert read_manifest(manifest.folder) == manifest
    elsewhere = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(elsewhere)
    moved = read_manifest(elsewhere)
    assert moved == manifest.model_copy(update={"folder": elsewhere})
    verify_shards(moved)


@pytest.mark.parametrize("text", [None, "", "[]", '{"fingerprint": 1}', '{"folder": "x"'])
def test_a_manifest_that_is_missing_or_damaged_is_refused(manifest, text):
    path = manifest.folder / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DatasetError, match=r"manifest\.json"):
        read_manifest(manifest.folder)


def test_all_broken_shards_are_reported_at_once(manifest):
    damage(manifest.folder / "train-00001.bin", "missing")
    damage(manifest.folder / "validation-00000.bin", "short")
    for check in (lambda: read_manifest(manifest.folder), lambda: verify_shards(manifest)):
        with pytest.raises(DatasetError) as caught:
            check()
        assert [p.key.rpartition("/")[2] for p in caught.value.problems] == [
            "train-00001.bin",
            "validation-00000.bin",
        ]


def test_verify_shards_finds_one_flipped_bit(manifest):
    verify_shards(manifest)
    path = manifest.folder / "train-00002.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    read_manifest(manifest.folder)
    with pytest.raises(DatasetError, match=r"train-00002\.bin"):
        verify_shards(manifest)


def test_reading_shards_needs_neither_polars_nor_pyarrow():
    program = (
        "import sys, gpt.data.shards\n"
        "assert not {'polars', 'pyarrow', 'torch', 'tiktoken'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
