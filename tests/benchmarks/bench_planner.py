"""Measure planning, the manifest and position lookups for a corpus that is metadata only: 100,000
files with 10 million row groups, 15 x 10^12 tokens.

    python tests/benchmarks/bench_planner.py --json planner.json
    python tests/benchmarks/bench_planner.py --files 1_000 --tokens 100_000_000_000
    python tests/benchmarks/bench_planner.py --journal 100_000

The contents of the footers are generated; everything after reading them is what a run does. The
shards are sparse files of the right length.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from planner_data import manifest, plan, sources, write_ids, write_sparse_shards

from gpt.data.filters import RowFilter
from gpt.data.loader import SequenceDataset, TrainingLoader
from gpt.data.parquet import inspect_parquet
from gpt.data.shards import read_manifest, record_verified, write_manifest
from gpt.data.shuffle import MAX_FULL_SHUFFLE, shuffle_epoch
from gpt.data.sources import find_sources
from gpt.data.tokenize.plan import plan_units
from gpt.data.tokenize.units import (
    SPLITS,
    UNIT_JOURNAL,
    JournalEntry,
    SplitCounts,
    UnitCounts,
    open_journal,
    read_stored_units,
)

BLOCK_SIZE = 1_024
LOOK_UPS = 1_000
BYTES_PER_TOKEN = 4.2
"""Average of FineWeb's text with this tokenizer."""


class Meter:
    """Collects the seconds of each part and the peak memory of this process until then."""

    def __init__(self):
        self.figures = {"before": {"peak_mb": peak_mb()}}

    def measure(self, name, work):
        began = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - began
        self.figures[name] = {"seconds": round(seconds, 6), "peak_mb": peak_mb()}
        print(f"{name:<42} {seconds:>12.6f} s   peak {peak_mb():>7,} MB", flush=True)
        return result


def peak_mb():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def main():
    options = arguments()
    meter = Meter()
    if options.journal:
        journal(meter, options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = planning(meter, options, Path(folder))
        made = manifests(meter, options, Path(folder) / "data", found)
        del found
        positions(meter, options, made)
        if options.footers:
            footers(meter, options, Path(folder) / "footers")
    meter.measure(
        f"order: whole shuffle of {MAX_FULL_SHUFFLE:,}",
        lambda: shuffle_epoch(MAX_FULL_SHUFFLE, 0, 0),
    )
    values = {**{k: v for k, v in vars(options).items() if k != "json"}, "measured": meter.figures}
    if options.json:
        Path(options.json).write_text(json.dumps(values, indent=2, default=str) + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--groups", type=int, default=100, help="row groups of each file")
    parser.add_argument("--tokens", type=int, default=15_000_000_000_000)
    parser.add_argument("--tokens-per-shard", type=int, default=100_000_000)
    parser.add_argument("--position", type=int, default=10_000_000_000_000, help="token to look up")
    parser.add_argument("--footers", type=int, default=20, help="real files whose footers are read")
    parser.add_argument("--journal", type=int, help="only read this many finished units")
    parser.add_argument("--folder", help="folder for the sparse shards")
    parser.add_argument("--json", help="file for the results")
    options = parser.parse_args()
    options.position = min(options.position, options.tokens * 9 // 10)
    return options


def planning(meter, options, root):
    """Plan from footers to every unit with its key."""
    text_bytes = int(options.tokens * BYTES_PER_TOKEN / options.files / options.groups)

    def footers_read():
        return list(sources(options.files, options.groups, text_bytes))

    found = meter.measure("generated: contents of the footers", footers_read)
    planned = meter.measure("plan: fingerprint of the dataset", lambda: plan(root, found))
    units = meter.measure(
        "plan: every unit and its key", lambda: sum(1 for _ in plan_units(planned, found))
    )
    groups = options.files * options.groups
    print(f"  {groups:,} row groups of {text_bytes:,} bytes: {units:,} units")
    meter.figures["units"] = units
    return found


def manifests(meter, options, folder, found):
    folder.mkdir()
    made = meter.measure(
        "manifest: made",
        lambda: manifest(folder, found, options.tokens, options.tokens_per_shard),
    )
    meter.measure("manifest: written", lambda: write_manifest(made))
    meter.measure("generated: shards without content", lambda: write_sparse_shards(made))
    read = meter.measure(
        "manifest: read, lengths of shards compared", lambda: read_manifest(folder)
    )
    assert read == made
    meter.measure("manifest: shards recorded as verified", lambda: record_verified(read))
    size = (folder / "manifest.json").stat().st_size
    print(f"  {len(made.train.shards):,} shards, {len(made.sources):,} files, {size:,} bytes")
    meter.figures["manifest_bytes"] = size
    return read


def positions(meter, options, made):
    sequences = meter.measure(
        "position: split opened", lambda: SequenceDataset(made, made.train, BLOCK_SIZE)
    )
    position = options.position // BLOCK_SIZE
    batches = TrainingLoader(sequences, seed=1337, position=position)

    def found():
        """Find the sequence at that position of the epoch without cached state."""
        epoch, place = divmod(position, len(sequences))
        index = batches.shuffle_epoch(epoch)(np.array([place]))
        return sequences.locate(index)[0]

    home = meter.measure(f"position: token {options.position:,}, first", found)
    shard, first_token = home
    write_ids(made, shard, first_token, np.arange(BLOCK_SIZE + 1))
    inputs, _ = meter.measure("position: that sequence read", lambda: batches.next_batch(1))
    assert inputs[0].tolist() == list(range(BLOCK_SIZE))
    chance = np.random.default_rng(0)
    places = chance.integers(0, len(sequences), LOOK_UPS)
    order = batches.shuffle_epoch(0)
    meter.measure(
        f"position: {LOOK_UPS:,} others, one by one",
        lambda: [sequences.locate(order(places[n : n + 1])) for n in range(LOOK_UPS)],
    )
    print(f"  {len(sequences):,} sequences; the position lies in shard {shard}")
    meter.figures["sequences"] = len(sequences)


def footers(meter, options, folder):
    """Write some real files with as many row groups and read their footers one by one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    names = ("text", "id", "dump", "url", "date", "file_path", "language")  # as in FineWeb
    rows = pa.table({name: ["some words"] * options.groups for name in names})
    for number in range(options.footers):
        pq.write_table(rows, folder / f"{number}.parquet", row_group_size=1)
    files, selection = find_sources([str(folder)]), RowFilter("text")
    inspect_parquet(files[0], selection)
    meter.measure(
        f"footers: {options.footers} real ones read",
        lambda: [inspect_parquet(file, selection) for file in files],
    )


def journal(meter, options):
    """Read what a resumed run reads first: one line per finished unit."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        splits = {split: SplitCounts(10, 10**6, 10**7, "0" * 64) for split in SPLITS}
        lengths = Counter(dict.fromkeys(range(5, 15), 100))
        counts = UnitCounts(2_000, Counter(null=0, empty=3), splits, lengths)
        entries = (
            JournalEntry(f"{number:032x}", "gigatoken", counts) for number in range(options.journal)
        )
        open_journal(Path(folder), options.tokens_per_shard, entries).close()
        size = (Path(folder) / UNIT_JOURNAL).stat().st_size
        read = meter.measure(
            f"journal: {options.journal:,} units read", lambda: read_stored_units(Path(folder))
        )
        assert len(read) == options.journal
        print(f"  {size:,} bytes; {meter.figures['before']['peak_mb']:,} MB before")


if __name__ == "__main__":
    main()
