"""Datasets shared through a store: a folder, fsspec's memory, an S3 bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_data import TEXTS, build_dataset, make_config, stored_ids, write_parquet
from fsspec.implementations.dirfs import DirFileSystem
from servers import BUCKET, KEYS, object_store

from gpt.config.loading import load_config
from gpt.data import store as stores
from gpt.data.shards import CHECKED, MANIFEST, verify_shards
from gpt.data.store import download_dataset, open_store, upload_dataset
from gpt.data.tokenize.pipeline import find_dataset
from gpt.errors import ConfigError, DatasetError

ROOT = Path(__file__).resolve().parents[3]


def run_transfer(transfer):
    """Exhaust a transfer; return its progress records and its result."""
    progress = []
    while True:
        try:
            progress.append(next(transfer))
        except StopIteration as end:
            return progress, end.value


def record_files(monkeypatch, method, names, position):
    """Append the file name, argument number `position`, of every transfer to `names`."""
    real = getattr(DirFileSystem, method)

    def recorded(*arguments):
        names.append(arguments[position].rpartition("/")[2])
        return real(*arguments)

    monkeypatch.setattr(DirFileSystem, method, recorded)


@pytest.fixture(scope="module")
def bucket():
    """A bucket, with its endpoint and keys in the environment."""
    with object_store() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": url}).items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}/data sets"


@pytest.fixture(params=["folder", "memory", "s3"])
def address(request, tmp_path):
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    return str(tmp_path / "shared") if request.param == "folder" else f"memory://{tmp_path.name}"


@pytest.fixture
def source(tmp_path):
    return write_parquet(tmp_path / "a.parquet", row_group_size=20)


def store_config(root, source, address, **data):
    return make_config(root, source, tokens_per_shard=1_000, store=address, **data)


def test_a_dataset_uploaded_by_one_machine_is_downloaded_by_another(tmp_path, source, address):
    here, there = (store_config(tmp_path / name, source, address) for name in ("here", "there"))
    made = build_dataset(tmp_path / "here", source, tokens_per_shard=1_000)
    assert find_dataset(here) == made
    assert run_transfer(download_dataset(there)) == ([], None), "it is not in the store yet"
    progress, uploaded = run_transfer(upload_dataset(made, address))
    assert uploaded
    done, total = progress[-1]
    assert done == total > 2 * (made.train.tokens + made.validation.tokens)
    assert run_transfer(upload_dataset(made, address)) == ([], False), "all of it is stored"

    progress, downloaded = run_transfer(download_dataset(there))
    assert len(progress) >= len(made.train.shards)
    assert downloaded.folder == tmp_path / "there" / "datasets" / made.folder.name
    assert downloaded.model_copy(update={"folder": made.folder}) == made
    assert stored_ids(downloaded) == stored_ids(made)
    verify_shards(downloaded)
    assert find_dataset(there) == downloaded
    names = {path.name for path in made.folder.iterdir()}
    assert {path.name for path in downloaded.folder.iterdir()} == names
    assert [path.name for path in downloaded.folder.parent.glob("*.partial")] == []


def test_units_of_a_downloaded_dataset_are_reused(tmp_path, source, monkeypatch):
    address = str(tmp_path / "shared")
    run_transfer(
        upload_dataset(build_dataset(tmp_path / "here", source, tokens_per_shard=1_000), address)
    )
    more = write_parquet(tmp_path / "b.parquet", TEXTS[:40])
    run_transfer(download_dataset(store_config(tmp_path / "there", source, address)))
    both = [source, more]
    expected = build_dataset(tmp_path / "other", both, tokens_per_shard=1_000)
    from gpt.data.tokenize import pipeline

    encoded = []
    real = pipeline.read_chunks
    monkeypatch.setattr(
        pipeline, "read_chunks", lambda source, *rest: encoded.append(source) or real(source, *rest)
    )
    assert stored_ids(
        build_dataset(tmp_path / "there", both, tokens_per_shard=1_000)
    ) == stored_ids(expected)
    assert {each.file.name for each in encoded} == {more}


def test_an_interrupted_upload_is_not_visible_and_is_completed(
    tmp_path, source, address, monkeypatch
):
    made = build_dataset(tmp_path / "here", source, tokens_per_shard=1_000)
    upload = upload_dataset(made, address)
    next(upload)
    next(upload)
    upload.close()
    # What an interrupted copy leaves.
    first = sorted(path for path in made.folder.iterdir() if path.suffix == ".bin")[0]
    (tmp_path / "short").write_bytes(first.read_bytes()[:100])
    open_store(address).put_file(str(tmp_path / "short"), f"{made.folder.name}/{first.name}")
    there = store_config(tmp_path / "there", source, address)
    assert run_transfer(download_dataset(there)) == ([], None)

    sent = []
    record_files(monkeypatch, "put_file", sent, -1)
    assert run_transfer(upload_dataset(made, address))[1]
    files = [path.name for path in made.folder.iterdir() if path.name not in (MANIFEST, CHECKED)]
    assert first.name in sent
    assert sent[-1].startswith(MANIFEST)
    assert len(sent) == len(files)  # all but one of the files, and the manifest
    assert stored_ids(run_transfer(download_dataset(there))[1]) == stored_ids(made)


def test_an_interrupted_download_continues_with_the_missing_files(
    tmp_path, source, address, monkeypatch
):
    made = build_dataset(tmp_path / "here", source, tokens_per_shard=1_000)
    run_transfer(upload_dataset(made, address))
    there = store_config(tmp_path / "there", source, address)
    download = download_dataset(there)
    for _ in range(3):
        next(download)
    download.close()
    assert find_dataset(there) is None
    got = []
    record_files(monkeypatch, "get_file", got, -2)
    _, downloaded = run_transfer(download_dataset(there))
    assert stored_ids(downloaded) == stored_ids(made)
    shards = {shard.name for shard in (*made.train.shards, *made.validation.shards)}
    assert len(shards - set(got)) in (2, 3)


@pytest.mark.parametrize("fault", ["altered", "missing", "another", "no manifest"])
def test_a_damaged_copy_is_refused(tmp_path, source, fault):
    address = str(tmp_path / "shared")
    made = build_dataset(tmp_path / "here", source, tokens_per_shard=1_000)
    run_transfer(upload_dataset(made, address))
    copy = tmp_path / "shared" / made.folder.name
    shard = copy / made.train.shards[1].name
    if fault == "altered":
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    elif fault == "missing":
        shard.unlink()
    elif fault == "another":
        text = (copy / MANIFEST).read_text().replace(made.fingerprint, "0" * 64)
        (copy / MANIFEST).write_text(text)
    else:
        (copy / MANIFEST).write_text("{}")
    there = store_config(tmp_path / "there", source, address)
    wrong = shard if fault in ("altered", "missing") else copy / MANIFEST
    with pytest.raises(DatasetError, match=f"delete {copy}; ") as refused:
        run_transfer(download_dataset(there))
    assert [problem.key for problem in refused.value.problems] == [str(wrong)]
    assert find_dataset(there) is None


def test_an_unreachable_store_is_logged_and_ignored(tmp_path, source, caplog, monkeypatch):
    address = str(tmp_path / "shared")
    made = build_dataset(tmp_path / "here", source, tokens_per_shard=1_000)

    def unreachable(*_, **__):
        raise ConnectionError("no answer")

    monkeypatch.setattr(DirFileSystem, "ls", unreachable)
    assert run_transfer(upload_dataset(made, address)) == ([], False)
    assert "cannot be written: ConnectionError: no answer" in caplog.text
    assert "the next run uploads it" in caplog.text
    assert run_transfer(download_dataset(store_config(tmp_path / "there", source, address))) == (
        [],
        None,
    )
    assert "cannot be read: ConnectionError: no answer" in caplog.text


def test_a_full_disk_is_an_error(tmp_path, source, monkeypatch):
    address = str(tmp_path / "shared")
    run_transfer(
        upload_dataset(build_dataset(tmp_path / "here", source, tokens_per_shard=1_000), address)
    )

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stores, "sync", full)
    with pytest.raises(DatasetError, match="the disk is full"):
        run_transfer(download_dataset(store_config(tmp_path / "there", source, address)))


@pytest.mark.parametrize(
    ("store", "rule"),
    [("nosuch://bucket", "fsspec does not support, nosuch://"), ("dropbox://x", "needs a package")],
)
def test_the_config_refuses_what_fsspec_cannot_open(tmp_path, store, rule):
    with pytest.raises(ConfigError, match=rule) as refused:
        store_config(tmp_path, "a.parquet", store)
    assert [problem.key for problem in refused.value.problems] == ["data.store"]


def test_sources_in_a_bucket_give_the_same_dataset(tmp_path, source, bucket):
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(f"{bucket}/sources")
    filesystem.put_file(source, f"{path}/a.parquet")
    here = build_dataset(tmp_path / "here", source)
    for name in (f"{bucket}/sources/a.parquet", f"{bucket}/sources/*.parquet"):
        assert stored_ids(build_dataset(tmp_path / "there", name)) == stored_ids(here)


def test_the_tokenize_command_uploads_and_downloads(tmp_path, tiny_config, bucket):
    def tokenized(name):
        overrides = [f"run.root={tmp_path / name}", f"data.store={bucket}"]
        words = [word for setting in overrides for word in ("--set", setting)]
        return subprocess.run(
            [sys.executable, "-m", "flows.cli.main", "tokenize", str(tiny_config), *words],
            **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120},
            env={k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")},
        )

    first, second = tokenized("first"), tokenized("second")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "tokenized into" in first.stdout
    assert f"uploaded the dataset to {bucket}" in first.stdout
    assert "downloaded the dataset to" in second.stdout
    assert "uploaded" not in second.stdout
    name = find_dataset(load_config(tiny_config, {"run": {"root": str(tmp_path / "first")}}))
    assert name
    assert (tmp_path / "second" / "datasets" / name.folder.name / MANIFEST).exists()
