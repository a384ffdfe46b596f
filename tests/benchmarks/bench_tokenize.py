"""Measure speed and memory of tokenizing: this code, one tiktoken thread and simple approaches.

    python tests/benchmarks/bench_tokenize.py PARQUET... [--megabytes 120] [--repeats 3] [--json F]
        [--picture F]

The rows of the files are repeated into one Parquet file of that many megabytes of text, and into
one of four times that. Every approach runs in its own process, one after the other, `--repeats`
times, so that other load affects all alike. A time is the minimum over the repeats, from the first
call with everything imported to the last byte on disk (the start of this code's workers included).
CPU seconds are those of the process and its children; a loaded machine distorts them least. Memory
is the peak of the proportional set size (PSS, which counts shared pages once), summed over the
process and its children and sampled 50 times per second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from gpt.config.loading import build_config
from gpt.data.tokenize.pipeline import tokenize_corpus
from gpt.data.tokenize.tokenizer import END_OF_TEXT, load_tokenizer

WORKERS = 2
SAMPLE_SECONDS = 0.02


# --- the approaches: each takes the file and a folder, and returns its tokens --------------------


def one_thread(source: Path, folder: Path) -> int:
    """Encode with encode_to_numpy, one document at a time."""
    encoding, tokens = load_tokenizer(), 0
    with (folder / "ids.bin").open("wb") as out, pq.ParquetFile(source) as file:
        for batch in file.iter_batches(64, columns=["text"]):
            for text in batch.column(0).to_pylist():
                ids = encoding.encode_to_numpy(text, disallowed_special=())
                out.write(np.array([END_OF_TEXT], dtype=np.uint16))
                out.write(ids.astype(np.uint16))
                tokens += ids.size + 1
    return tokens


def whole_file(source: Path, folder: Path) -> int:
    """Encode everything to lists, then to one array."""
    encoding = load_tokenizer()
    texts = pq.read_table(source, columns=["text"])["text"].to_pylist()
    ids = [i for text in texts for i in (END_OF_TEXT, *encoding.encode_ordinary(text))]
    np.array(ids, dtype=np.uint16).tofile(folder / "ids.bin")
    return len(ids)


def _document(text: str) -> np.ndarray:
    ids = [END_OF_TEXT, *load_tokenizer().encode_ordinary(text)]
    return np.array(ids, dtype=np.uint16)


def pool(source: Path, folder: Path) -> int:
    """Encode as llm.c does: a pool of processes, one document at a time, into one array."""
    texts = pq.read_table(source, columns=["text"])["text"].to_pylist()
    with multiprocessing.get_context("fork").Pool(WORKERS) as processes:
        arrays = list(processes.imap(_document, texts, chunksize=16))
    ids = np.concatenate(arrays)
    ids.tofile(folder / "ids.bin")
    return ids.size


def threads(source: Path, folder: Path) -> int:
    """Encode with encode_ordinary_batch, two threads, one row group at a time."""
    encoding, tokens = load_tokenizer(), 0
    with (folder / "ids.bin").open("wb") as out, pq.ParquetFile(source) as file:
        for group in range(file.num_row_groups):
            texts = file.read_row_group(group, columns=["text"])["text"].to_pylist()
            for ids in encoding.encode_ordinary_batch(texts, num_threads=WORKERS):
                out.write(np.array([END_OF_TEXT, *ids], dtype=np.uint16))
                tokens += len(ids) + 1
    return tokens


def _ours(source: Path, folder: Path, engine: str) -> int:
    config = build_config(
        {
            "run": {"name": "bench", "root": str(folder)},
            "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8},
            "data": {"source": str(source), "engine": engine, "workers": WORKERS},
            "training": {"batch_size": 1, "grad_acc": 1, "max_steps": 1},
        }
    )
    steps = tokenize_corpus(config)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value.train.tokens + done.value.validation.tokens


def ours(source: Path, folder: Path) -> int:
    return _ours(source, folder, "tiktoken")


def turbo(source: Path, folder: Path) -> int:
    return _ours(source, folder, "gigatoken")


APPROACHES = {
    "one tiktoken thread": one_thread,
    "whole file to lists": whole_file,
    "pool of 2 processes": pool,
    "batches, 2 threads": threads,
    "this code, tiktoken, 2 workers": ours,
    "this code, gigatoken, 2 workers": turbo,
}
THIS_CODE = [name for name in APPROACHES if name.startswith("this code")]


# --- measuring -----------------------------------------------------------------------------------


def measure(name: str, source: Path) -> dict[str, float]:
    """Run one approach in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--run", name, str(source), folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment())
        peak = 0
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        assert process.stdout
        if process.returncode:
            raise SystemExit(f"{name} ended with {process.returncode}")
        measured = json.loads(process.stdout.read())
    return measured | {"peak_bytes": peak}


def tree_bytes(pid: int) -> int:
    """Return the PSS of a process and its descendants."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:
        return 0
    return total


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def repeated(sources: list[Path], megabytes: float, path: Path) -> int:
    """Write a Parquet file that repeats the texts of the sources; return its bytes of text."""
    written = 0
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="zstd") as writer:
        while written < megabytes * 1e6:
            for source in sources:
                for batch in pq.ParquetFile(source).iter_batches(1_000, columns=["text"]):
                    if written >= megabytes * 1e6:
                        break
                    table = pa.table({"text": batch.column(0).cast(pa.string())})
                    writer.write_table(table)
                    written += table.nbytes
    return written


def run_once(name: str, source: Path, folder: Path) -> None:
    load_tokenizer()  # warm for the approaches that encode in their own process
    started, before = time.perf_counter(), cpu_seconds()
    tokens = APPROACHES[name](source, folder)
    seconds = time.perf_counter() - started
    cpu = cpu_seconds() - before
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "tokens": tokens}))


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def bench(
    sources: list[Path], megabytes: float, repeats: int, approaches: list[str]
) -> dict[str, object]:
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        once, four = Path(folder, "once.parquet"), Path(folder, "four.parquet")
        text_bytes = repeated(sources, megabytes, once)
        repeated(sources, 4 * megabytes, four)
        for _ in range(repeats):
            for name in approaches:
                measured = measure(name, once)
                best = figures.setdefault(name, measured)
                best["seconds"] = min(best["seconds"], measured["seconds"])
                best["cpu_seconds"] = min(best["cpu_seconds"], measured["cpu_seconds"])
                best["peak_bytes"] = max(best["peak_bytes"], measured["peak_bytes"])
        for name in [name for name in THIS_CODE if name in approaches]:
            measured = measure(name, four)
            figures[name]["peak_bytes_4x"] = measured["peak_bytes"]
            figures[name]["seconds_4x"] = measured["seconds"]
    base = figures["one tiktoken thread"]["seconds"]
    for row in figures.values():
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        row["times_one_thread"] = base / row["seconds"]
    return {"text_bytes": text_bytes, "workers": WORKERS, "approaches": figures}


# --- report --------------------------------------------------------------------------------------


def table(result: dict) -> str:
    lines = [
        f"{result['text_bytes'] / 1e6:.0f} MB of text",
        "",
        "| approach | Mtok/s | times one thread | CPU s | peak PSS, MB | with 4x the input, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["approaches"].items():
        four = f"{row['peak_bytes_4x'] / 1e6:.0f}" if "peak_bytes_4x" in row else ""
        lines.append(
            f"| {name} | {row['tokens_per_second'] / 1e6:.2f} | {row['times_one_thread']:.2f} "
            f"| {row['cpu_seconds']:.1f} | {row['peak_bytes'] / 1e6:.0f} | {four} |"
        )
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(result["approaches"])[::-1]
    rows = [result["approaches"][name] for name in names]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2, sharey=True)
    speed.barh(names, [row["tokens_per_second"] / 1e6 for row in rows])
    speed.set_xlabel("million tokens per second")
    memory.barh(names, [row["peak_bytes"] / 1e6 for row in rows], color="tab:orange")
    memory.set_xlabel("peak memory (PSS), MB")
    figure.savefig(path, dpi=120)


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        run_once(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path, metavar="PARQUET")
    parser.add_argument("--megabytes", type=float, default=120.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--approaches", nargs="+", default=list(APPROACHES), metavar="NAME")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    result = bench(asked.sources, asked.megabytes, asked.repeats, asked.approaches)
    print(table(result))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n")
    if asked.picture:
        draw(result, asked.picture)


if __name__ == "__main__":
    main()
