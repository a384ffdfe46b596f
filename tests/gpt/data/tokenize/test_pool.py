"""Worker processes: order and number of pending requests, dead workers, cleanup."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from corpus_data import (
    TEXTS,
    build_dataset,
    make_config,
    reference_ids,
    stored_ids,
    tokenize_with_progress,
    write_parquet,
)
from waiting import scaled

from gpt.data.tokenize import chunks, encoders, pipeline, pool, units
from gpt.data.tokenize.encoders import PART, Chunk, encode_chunk, resolve_engine
from gpt.data.tokenize.pipeline import tokenize_corpus
from gpt.data.tokenize.pool import map_in_order, open_pool
from gpt.errors import CorpusError

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), "tests/helpers"])}


def chunk(text):
    """A chunk of one document."""
    data = text if isinstance(text, bytes) else text.encode()
    return Chunk(data, np.array([(len(data), 0, True, True, False)], dtype=PART))


def _all_children():
    return set(psutil.Process().children(recursive=True))


@pytest.fixture
def children():
    """Returns the child processes started since the test began."""
    before = _all_children()
    return lambda: _all_children() - before


@pytest.mark.parametrize("workers", [1, 3])
def test_results_are_in_the_order_of_the_items(workers, children):
    texts = ["word " * (50_000 if i % 7 == 0 else 1) + str(i) for i in range(40)]
    items = [(text, chunk(text) if i % 5 else None) for i, text in enumerate(texts)]
    with open_pool("tiktoken", workers) as workers_pool:
        results = list(map_in_order(workers_pool, items))
    assert [text for text, _ in results] == texts
    for (_, request), (_, encoded) in zip(items, results, strict=True):
        if request:
            assert np.array_equal(encoded.ids, encode_chunk("tiktoken", request).ids)
        else:
            assert encoded is None
    assert not children()


def test_pending_items_are_bounded():
    drawn = []

    def items():
        for i in range(100):
            drawn.append(i)
            yield i, chunk(str(i))

    with open_pool("tiktoken", 2) as workers_pool:
        results = map_in_order(workers_pool, items())
        next(results)
        assert len(drawn) <= 2 * pool.CHUNKS_PER_WORKER + 1


def test_dead_worker_is_explained_and_the_next_run_resumes(tmp_path, monkeypatch, children):
    monkeypatch.setattr(pipeline, "TEXT_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)
    monkeypatch.setattr(units, "UNIT_BYTES", 2_000)
    config = make_config(
        tmp_path / "runs", write_parquet(tmp_path / "a.parquet", row_group_size=20), workers=2
    )
    generator = tokenize_corpus(config)
    next(generator)
    for child in children():
        child.kill()
    with pytest.raises(CorpusError, match="exit status -9"):
        list(generator)
    assert not children()
    assert stored_ids(tokenize_with_progress(config)[1]) == reference_ids(TEXTS)


def test_error_in_a_worker_has_its_traceback(monkeypatch):
    with open_pool("tiktoken", 2) as workers_pool:
        with pytest.raises(RuntimeError, match="UnicodeDecodeError"):
            workers_pool.submit(chunk(b"\xff")).result()
        assert workers_pool.submit(chunk("still there")).result().ids.size


def test_worker_does_not_import_heavy_packages():
    program = (
        "import sys, gpt.data.tokenize.worker\n"
        "heavy = {'torch', 'pyarrow', 'polars', 'prefect', 'mlflow', 'pydantic', 'gigatoken'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=ENVIRONMENT)


def test_engine_that_is_not_installed_is_explained(monkeypatch):
    monkeypatch.setattr(encoders, "GIGATOKEN_PACKAGE", "no_such_package_here")
    assert resolve_engine("auto") == "tiktoken"
    with pytest.raises(CorpusError, match="pip install"):
        resolve_engine("gigatoken")


# --- the command killed --------------------------------------------------------------------------

# No `if __name__ == "__main__"`: workers must not import the parent's program.
SCRIPT = """
import sys
from corpus_data import make_config
from gpt.data.tokenize import chunks, pipeline, units
from gpt.data.tokenize.pipeline import tokenize_corpus
pipeline.TEXT_BYTES_PER_WORKER, chunks.CHUNK_BYTES, units.UNIT_BYTES = 1, 5_000, 25_000
config = make_config(sys.argv[1], sys.argv[2], workers=2, tokens_per_shard=20_000)
for step in tokenize_corpus(config):
    print(step.rows_reused, step.rows_done, flush=True)
print("done", flush=True)
"""
LONG = [f"{i}: It's a longer document, naïve 東京。" * (5 + i % 50) for i in range(1_500)]


def start(root, source, first=""):
    command = [sys.executable, "-c", first + SCRIPT, str(root), source]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finished_rows(root):
    """Rows of the units in the journal of the unfinished dataset."""
    journals = list(root.glob("datasets/*.partial/units.jsonl"))
    lines = journals[0].read_text().splitlines()[1:] if journals else []
    complete = [line for line in lines if line.endswith("}")]
    return sum(json.loads(line)["tally"]["rows"] for line in complete)


def kill_at_random(root, source, kills, seed):
    """Kill the command after a random number of steps; every finished unit must be reused. Returns
    the number of kills that interrupted it."""
    generator = np.random.default_rng(seed)
    hits = 0
    for _ in range(kills):
        before = finished_rows(root)
        process = start(root, source)
        lines = int(generator.integers(1, 60))
        reused = None
        for line in process.stdout:
            if line.startswith("done"):
                break
            reused = reused or line.split()[0]
            lines -= 1
            if lines == 0:
                time.sleep(generator.random() / 20)
                break
        workers = psutil.Process(process.pid).children() if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        psutil.wait_procs(workers, timeout=scaled(10))
        assert not [worker for worker in workers if worker.is_running()]
        assert not list(root.glob("datasets/*.partial/manifest.json"))
        if before:
            assert int(reused) >= before
        hits += bool(list(root.glob("datasets/*.partial")))
    return hits


def test_finished_units_survive_random_kills(tmp_path):
    root = tmp_path / "runs"
    source = write_parquet(tmp_path / "a.parquet", LONG, row_group_size=70)
    assert kill_at_random(root, source, 3, seed=0)
    assert stored_ids(build_dataset(root, source, tokens_per_shard=20_000)) == reference_ids(LONG)
    assert not list(root.glob("datasets/*.partial"))


def test_second_process_waits_for_the_first(tmp_path):
    root, source = tmp_path / "runs", write_parquet(tmp_path / "a.parquet", LONG, row_group_size=70)
    threads = "import torch; torch.ones(600, 600) @ torch.ones(600, 600)"
    processes = [start(root, source, threads) for _ in range(2)]
    steps = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(len(lines) > 1 for lines in steps) == [False, True]
    assert stored_ids(build_dataset(root, source, tokens_per_shard=20_000)) == reference_ids(LONG)
