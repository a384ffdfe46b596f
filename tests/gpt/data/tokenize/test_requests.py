"""Units encoded on request: other machines return what this one would have written."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from corpus_data import TEXTS, build_dataset, make_config, tokenize_with_progress, write_parquet

from gpt.data.tokenize import chunks, encoders, requests, units
from gpt.data.tokenize.pipeline import tokenize_corpus
from gpt.data.tokenize.requests import encode_unit
from gpt.data.tokenize.tokenizer import EncoderMismatchError
from gpt.errors import CorpusError


class RemotePool:
    """A pool of two workers that exchange pickles only, as on other machines."""

    max_pending = 4

    def __init__(self, threads):
        self._threads, self.requests = threads, []

    def submit(self, request):
        self.requests.append(request)
        return self._threads.submit(self._work, pickle.dumps(request))

    def _work(self, sent):
        return pickle.loads(pickle.dumps(encode_unit(pickle.loads(sent))))


@pytest.fixture
def cluster():
    """Opens a `RemotePool`; `cluster.requests` are the requests it received."""

    class Opened:
        requests = ()

        @contextmanager
        def __call__(self):
            with ThreadPoolExecutor(2) as threads:
                pool = RemotePool(threads)
                self.requests = pool.requests
                yield pool

    return Opened()


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 2_000)


def build_on(cluster, config):
    steps = tokenize_corpus(config, cluster)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def without_folder(manifest):
    return manifest.model_dump(exclude={"folder"})


SETTINGS = {
    "plain": {},
    "where": {"where": "id < 250", "min_length": 50, "max_length": 60},
    "duplicates": {"drop_duplicates": True},
    "max_tokens": {"max_tokens": 3_000},
    "duplicates and max_tokens": {"drop_duplicates": True, "max_tokens": 3_000},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.usefixtures("small_units")
def test_cluster_builds_the_same_dataset(tmp_path, monkeypatch, cluster, settings):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)
    long = "one text of many chunks " * 60
    texts = [*TEXTS[:90], long, None, "", *TEXTS[60:200], long, *TEXTS[190:]]
    sources = [
        write_parquet(tmp_path / "a.parquet", texts, row_group_size=20),
        write_parquet(tmp_path / "b.parquet", TEXTS[100:220], row_group_size=200),
    ]
    settings = {"tokens_per_shard": 1_000, **settings}
    here = build_dataset(tmp_path / "here", sources, **settings)
    there = build_on(cluster, make_config(tmp_path / "there", sources, runner="dask", **settings))
    assert len(cluster.requests) >= (3 if "max_tokens" in settings else 10)
    if settings.get("drop_duplicates") and "max_tokens" in settings:
        # Rows after the last document may count as skipped for another reason.
        assert sum(here.skipped.values()) == sum(there.skipped.values())
        here, there = (each.model_copy(update={"skipped": {}}) for each in (here, there))
    assert without_folder(there) == without_folder(here)


@pytest.mark.usefixtures("small_units")
def test_finished_units_are_not_requested(tmp_path, cluster):
    a = write_parquet(tmp_path / "a.parquet", TEXTS[:150], row_group_size=20)
    b = write_parquet(tmp_path / "b.parquet", TEXTS[150:], row_group_size=20)
    config = make_config(tmp_path / "runs", [a, b], tokens_per_shard=1_000)
    build_dataset(tmp_path / "runs", b)
    of_b = build_on(cluster, make_config(tmp_path / "runs", b, tokens_per_shard=1_000))
    assert not cluster.requests
    assert of_b.train.tokens
    generator = tokenize_corpus(config)
    before = [next(generator) for _ in range(3)][-1]
    generator.close()
    resumed = build_on(cluster, config)
    sent = [encode_request.unit.rows for encode_request in cluster.requests]
    assert sent
    assert sent[0].start >= before.rows_done - 40
    assert {encode_request.source.file.name for encode_request in cluster.requests} == {a}
    assert without_folder(resumed) == without_folder(
        build_dataset(tmp_path / "other", [a, b], tokens_per_shard=1_000)
    )


def test_relative_paths_are_resolved_on_the_requesting_machine(tmp_path, monkeypatch, cluster):
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    dataset = build_on(cluster, make_config(tmp_path / "runs", "a.parquet"))
    assert [source.path for source in dataset.sources] == ["a.parquet"]
    monkeypatch.chdir("/")
    assert encode_unit(cluster.requests[0]).chunks


@pytest.fixture
def encode_request(tmp_path, cluster):
    build_on(cluster, make_config(tmp_path / "runs", write_parquet(tmp_path / "a.parquet")))
    return cluster.requests[0]


def test_worker_reports_a_different_file(encode_request):
    with Path(encode_request.source.file.name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(CorpusError, match=r"a\.parquet\n.*bytes instead of .* \(on .*\)"):
        encode_unit(encode_request)
    Path(encode_request.source.file.name).unlink()
    with pytest.raises(CorpusError, match=r"No such file or directory \(on .*\)"):
        encode_unit(encode_request)


def test_worker_reports_a_different_installation(encode_request, monkeypatch):
    with pytest.raises(CorpusError, match="same version"):
        encode_unit(replace(encode_request, format=0))
    monkeypatch.setattr(encoders, "GIGATOKEN_PACKAGE", "no_such_package_here")
    with pytest.raises(CorpusError, match="gigatoken is not installed"):
        encode_unit(replace(encode_request, engine="gigatoken"))


def test_mismatch_on_a_worker_falls_back_for_the_dataset(tmp_path, monkeypatch, cluster):
    source = write_parquet(tmp_path / "a.parquet")
    expected = tokenize_with_progress(make_config(tmp_path / "here", source, engine="tiktoken"))[1]
    work = requests.encode_unit

    def mistaken(encode_request):
        if encode_request.engine == "gigatoken":
            raise EncoderMismatchError("for a test")
        return work(encode_request)

    monkeypatch.setattr(sys.modules[__name__], "encode_unit", mistaken)
    dataset = build_on(cluster, make_config(tmp_path / "there", source, engine="gigatoken"))
    assert dataset.engine == "tiktoken"
    assert dataset.train.shards == expected.train.shards
