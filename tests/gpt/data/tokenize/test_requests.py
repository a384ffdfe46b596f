"""Units as orders: what another machine makes of them is what this one would have made."""

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from corpus_data import TEXTS, build_dataset, make_config, tokenize_with_progress, write_parquet

from gpt.data.tokenize import chunks, requests, units
from gpt.data.tokenize.encoders import EncoderMismatchError
from gpt.data.tokenize.pipeline import tokenize_corpus
from gpt.data.tokenize.requests import encode_unit
from gpt.errors import CorpusError


class Elsewhere:
    """Two workers that get and send nothing but bytes, and work in another folder."""

    max_pending = 4

    def __init__(self, threads):
        self._threads, self.orders = threads, []

    def submit(self, order):
        self.orders.append(order)
        return self._threads.submit(self._work, pickle.dumps(order))

    def _work(self, sent):
        return pickle.loads(pickle.dumps(encode_unit(pickle.loads(sent))))


@pytest.fixture
def cluster():
    """Opens `Elsewhere`; `cluster.orders` is what it was sent."""

    class Opened:
        requests = ()

        @contextmanager
        def __call__(self):
            with ThreadPoolExecutor(2) as threads:
                elsewhere = Elsewhere(threads)
                self.orders = elsewhere.orders
                yield elsewhere

    return Opened()


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 2_000)


def made_by(cluster, made):
    steps = tokenize_corpus(made, cluster)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def but_folder(manifest):
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
    there = made_by(cluster, make_config(tmp_path / "there", sources, runner="dask", **settings))
    assert len(cluster.orders) >= (3 if "max_tokens" in settings else 10)
    if settings.get("drop_duplicates") and "max_tokens" in settings:
        # Rows behind the last document may count under another reason.
        assert sum(here.skipped.values()) == sum(there.skipped.values())
        here, there = (each.model_copy(update={"skipped": {}}) for each in (here, there))
    assert but_folder(there) == but_folder(here)


@pytest.mark.usefixtures("small_units")
def test_finished_units_are_not_requested(tmp_path, cluster):
    a = write_parquet(tmp_path / "a.parquet", TEXTS[:150], row_group_size=20)
    b = write_parquet(tmp_path / "b.parquet", TEXTS[150:], row_group_size=20)
    made = make_config(tmp_path / "runs", [a, b], tokens_per_shard=1_000)
    build_dataset(tmp_path / "runs", b)
    of_b = made_by(cluster, make_config(tmp_path / "runs", b, tokens_per_shard=1_000))
    assert not cluster.orders
    assert of_b.train.tokens
    generator = tokenize_corpus(made)
    kept = [next(generator) for _ in range(3)][-1]
    generator.close()
    whole = made_by(cluster, made)
    sent = [order.unit.rows for order in cluster.orders]
    assert sent
    assert sent[0].start >= kept.rows_done - 40
    assert {order.source.file.name for order in cluster.orders} == {a}
    assert but_folder(whole) == but_folder(
        build_dataset(tmp_path / "other", [a, b], tokens_per_shard=1_000)
    )


def test_relative_paths_are_resolved_on_the_requesting_machine(tmp_path, monkeypatch, cluster):
    write_parquet(tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    made = made_by(cluster, make_config(tmp_path / "runs", "a.parquet"))
    assert [source.path for source in made.sources] == ["a.parquet"]
    monkeypatch.chdir("/")
    assert encode_unit(cluster.orders[0]).chunks


@pytest.fixture
def order(tmp_path, cluster):
    made_by(cluster, make_config(tmp_path / "runs", write_parquet(tmp_path / "a.parquet")))
    return cluster.orders[0]


def test_worker_reports_a_different_file(order):
    with Path(order.source.file.name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(CorpusError, match=r"a\.parquet\n.*bytes instead of .* \(on .*\)"):
        encode_unit(order)
    Path(order.source.file.name).unlink()
    with pytest.raises(CorpusError, match=r"No such file or directory \(on .*\)"):
        encode_unit(order)


def test_worker_reports_a_different_installation(order, monkeypatch):
    with pytest.raises(CorpusError, match="same version"):
        encode_unit(replace(order, format=0))
    monkeypatch.setattr(requests, "resolve_engine", lambda _: "tiktoken")
    with pytest.raises(CorpusError, match="gigatoken is not installed"):
        encode_unit(replace(order, engine="gigatoken"))


def test_mismatch_on_a_worker_falls_back_for_the_dataset(tmp_path, monkeypatch, cluster):
    source = write_parquet(tmp_path / "a.parquet")
    expected = tokenize_with_progress(make_config(tmp_path / "here", source, engine="tiktoken"))[1]
    work = requests.encode_unit

    def mistaken(order):
        if order.engine == "gigatoken":
            raise EncoderMismatchError("for a test")
        return work(order)

    monkeypatch.setattr(sys.modules[__name__], "encode_unit", mistaken)
    made = made_by(cluster, make_config(tmp_path / "there", source, engine="gigatoken"))
    assert made.engine == "tiktoken"
    assert made.train.shards == expected.train.shards
