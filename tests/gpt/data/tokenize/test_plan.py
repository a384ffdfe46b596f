"""Planning a corpus of any size: units with their keys, a manifest of many shards, and the order of
an epoch, on metadata alone. Its full size is tests/benchmarks/bench_planner.py."""

import numpy as np
import planner_data
import pytest
from training_data import make_token_dataset

from gpt.artifacts import DatasetManifest
from gpt.config.schema import fingerprint
from gpt.data import loader as batches_module
from gpt.data import shuffle as order_module
from gpt.data.loader import SequenceDataset, TrainingLoader
from gpt.data.shards import read_manifest, record_verified, write_manifest
from gpt.data.shuffle import MAX_FULL_SHUFFLE, FeistelPermutation, shuffle_epoch
from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.plan import FORMAT_VERSION, non_default_settings, plan_units
from gpt.data.tokenize.units import split_into_units

# --- units ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return list(planner_data.sources(files=60, groups=100, text_bytes_of_group=6_300_000))


def keys_by_the_rule(plan, sources):
    """Each unit's key as it has been since the first data set, units held all at once."""
    data = plan.data
    settings = fingerprint(
        {
            "format": FORMAT_VERSION,
            "ranks": tokenizer.RANKS_SHA256,
            "text_column": data.text_column,
            "validation_fraction": data.validation_fraction,
            "selection": {k: v for k, v in non_default_settings(data).items() if k != "max_tokens"},
        }
    )
    keys, before = [], ""
    for source in sources:
        identity = plan.identities.by_file[source.file].sha256
        for unit in split_into_units([tuple(group) for group in source.groups.tolist()]):
            rows = [unit.rows.start, unit.rows.stop]
            values = {"settings": settings, "file": identity, "rows": rows, "before": before}
            keys.append(fingerprint(values | {"partitions": {}})[:32])
            before = keys[-1] if data.drop_duplicates else ""
    return keys


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_units_are_those_that_they_always_were(tmp_path, found, drop_duplicates):
    plan = planner_data.plan(tmp_path, found, drop_duplicates=drop_duplicates, min_length=7)
    keys = keys_by_the_rule(plan, found)
    assert len(set(keys)) == len(keys) > 1_900
    assert [unit.key for unit in plan_units(plan, found)] == keys


def test_units_cover_every_row_once(tmp_path, found):
    rows = {source.file: 0 for source in found}
    for planned in plan_units(planner_data.plan(tmp_path, found), found):
        assert planned.unit.rows.start == rows[planned.source.file]
        rows[planned.source.file] = planned.unit.rows.stop
    assert list(rows.values()) == [source.rows for source in found]


def test_the_name_is_by_the_files_and_no_files_are_no_units(tmp_path, found):
    plans = [planner_data.plan(tmp_path, some) for some in (found, found, found[1:])]
    assert plans[0].fingerprint == plans[1].fingerprint != plans[2].fingerprint
    assert list(plan_units(plans[0], [])) == []


# --- the manifest and the positions --------------------------------------------------------------


@pytest.fixture
def large(tmp_path, found):
    """1,500 shards of 10,000 tokens, of which no byte is there."""
    made = planner_data.manifest(tmp_path / "data", found, 15_004_321, 10_000)
    made.folder.mkdir()
    planner_data.write_sparse_shards(made)
    write_manifest(made)
    record_verified(made)
    return made


def test_a_manifest_of_many_shards_is_read_back(large):
    read = read_manifest(large.folder)
    assert read == large
    assert type(read) is DatasetManifest
    assert read.model_dump() == large.model_dump()
    assert len(read.train.shards) == 1_501


@pytest.mark.parametrize("largest", [MAX_FULL_SHUFFLE, 100])
def test_a_position_is_found_and_read(large, monkeypatch, largest):
    monkeypatch.setattr(order_module, "MAX_FULL_SHUFFLE", largest)
    monkeypatch.setattr(batches_module, "MAX_OPEN_SHARDS", 2)
    sequences = SequenceDataset(large, large.train, 64)
    assert len(sequences) == 1_500 * (9_999 // 64) + 4_320 // 64
    position = len(sequences) + 100_000  # in the second epoch
    places = np.arange(100_000, 100_004)
    locations = sequences.locate(shuffle_epoch(len(sequences), 5, 1)(places))
    for number, (shard, first_token) in enumerate(locations):
        planner_data.write_ids(large, shard, first_token, np.arange(65) + 100 * number)
    # What is written is younger than what was remembered.
    record_verified(large)
    inputs, targets = TrainingLoader(sequences, seed=5, position=position).next_batch(4)
    assert inputs[:, 0].tolist() == [0, 100, 200, 300]
    assert targets[:, -1].tolist() == [64, 164, 264, 364]


def test_locations_match_a_count_of_the_shards(tmp_path):
    made = make_token_dataset(tmp_path, train_tokens=1_000, tokens_per_shard=130)
    counted = [
        (number, 10 * n)
        for number, shard in enumerate(made.train.shards)
        for n in range((shard.tokens - 1) // 10)
    ]
    sequences = SequenceDataset(made, made.train, 10)
    assert len(sequences) == len(counted)
    assert sequences.locate(np.arange(len(counted))) == counted


# --- the order -----------------------------------------------------------------------------------


def test_the_order_of_what_can_be_shuffled_stays_what_it_was(tmp_path):
    """Runs that have begun go on over the same sequences: numpy's shuffle of (seed, epoch)."""
    made = make_token_dataset(tmp_path)
    sequences = SequenceDataset(made, made.train, 32)
    count = len(sequences)
    taken, _ = TrainingLoader(sequences, seed=3).next_batch(count + 10)
    orders = [np.random.default_rng((3, epoch)).permutation(count) for epoch in (0, 1)]
    expected, _ = sequences.read(np.concatenate([orders[0], orders[1][:10]]))
    assert taken.equal(expected)
    assert MAX_FULL_SHUFFLE == 2**27


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1_000, 4_097])
def test_every_sequence_comes_once(count):
    for epoch in range(3):
        assert sorted(FeistelPermutation(count, 7, epoch)(np.arange(count)).tolist()) == list(
            range(count)
        )


def test_places_of_a_huge_epoch_are_known_alone_and_spread_evenly():
    count = 10**10
    order = FeistelPermutation(count, 1337, 0)
    places = np.random.default_rng(0).integers(0, count, 50_000)
    found = order(places)
    assert np.array_equal(found[17:23], order(places[17:23]))
    assert 0 <= found.min() <= found.max() < count
    assert len(np.unique(found)) == len(np.unique(places))
    # Neighbours go anywhere: each of 100 parts gets its hundredth, within five deviations.
    neighbours = order(np.arange(50_000))
    counts = np.bincount(neighbours // (count // 100), minlength=100)
    assert np.abs(counts - 500).max() < 5 * 500**0.5
    assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 0.02
    assert not np.array_equal(found, FeistelPermutation(count, 1337, 1)(places))
    assert not np.array_equal(found, FeistelPermutation(count, 1338, 0)(places))


def test_the_huge_order_is_the_same_everywhere():
    """On another machine, under another numpy: these numbers are what runs depend on."""
    places = np.array([0, 1, 2, 9_765_625_000 - 1])
    assert FeistelPermutation(9_765_625_000, 1337, 0)(places).tolist() == GOLDEN


GOLDEN = [7776894264, 6495100747, 9314612687, 8653850970]


def test_size_alone_decides_which_order(monkeypatch):
    monkeypatch.setattr(order_module, "MAX_FULL_SHUFFLE", 1_000)
    places = np.arange(1_000)
    shuffled = np.random.default_rng((1, 2)).permutation(1_000)
    assert np.array_equal(shuffle_epoch(1_000, 1, 2)(places), shuffled)
    assert np.array_equal(
        shuffle_epoch(1_001, 1, 2)(places), FeistelPermutation(1_001, 1, 2)(places)
    )
