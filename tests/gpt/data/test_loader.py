"""Positions in large datasets, on sparse shards, and the order of an epoch."""

import numpy as np
import planner_data
import pytest
from training_data import make_token_dataset

from gpt.artifacts import DatasetManifest
from gpt.data import loader, shuffle
from gpt.data.loader import SequenceDataset, TrainingLoader
from gpt.data.shards import read_manifest, record_verified, write_manifest
from gpt.data.shuffle import MAX_FULL_SHUFFLE, FeistelPermutation, shuffle_epoch


@pytest.fixture
def large(tmp_path):
    """A dataset of 1,501 sparse shards of 10,000 tokens."""
    found = list(planner_data.sources(files=60, groups=100, text_bytes_of_group=6_300_000))
    made = planner_data.manifest(tmp_path / "data", found, 15_004_321, 10_000)
    made.folder.mkdir()
    planner_data.write_sparse_shards(made)
    write_manifest(made)
    record_verified(made)
    return made


def test_manifest_of_many_shards_is_read_back(large):
    read = read_manifest(large.folder)
    assert read == large
    assert type(read) is DatasetManifest
    assert read.model_dump() == large.model_dump()
    assert len(read.train.shards) == 1_501


@pytest.mark.parametrize("largest", [MAX_FULL_SHUFFLE, 100])
def test_batch_at_a_position_in_a_later_epoch(large, monkeypatch, largest):
    monkeypatch.setattr(shuffle, "MAX_FULL_SHUFFLE", largest)
    monkeypatch.setattr(loader, "MAX_OPEN_SHARDS", 2)
    sequences = SequenceDataset(large, large.train, 64)
    assert len(sequences) == 1_500 * (9_999 // 64) + 4_320 // 64
    position = len(sequences) + 100_000  # in the second epoch
    places = np.arange(100_000, 100_004)
    locations = sequences.locate(shuffle_epoch(len(sequences), 5, 1)(places))
    for number, (shard, first_token) in enumerate(locations):
        planner_data.write_ids(large, shard, first_token, np.arange(65) + 100 * number)
    # The shards are now newer than the record of their verification.
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


# --- shuffling -----------------------------------------------------------------------------------


def test_full_shuffle_is_unchanged(tmp_path):
    """Runs resume with the same sequences: numpy's permutation for (seed, epoch)."""
    made = make_token_dataset(tmp_path)
    sequences = SequenceDataset(made, made.train, 32)
    count = len(sequences)
    taken, _ = TrainingLoader(sequences, seed=3).next_batch(count + 10)
    permutations = [np.random.default_rng((3, epoch)).permutation(count) for epoch in (0, 1)]
    expected, _ = sequences.read(np.concatenate([permutations[0], permutations[1][:10]]))
    assert taken.equal(expected)
    assert MAX_FULL_SHUFFLE == 2**27


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 1_000, 4_097])
def test_permutation_has_every_sequence_once(count):
    for epoch in range(3):
        assert sorted(FeistelPermutation(count, 7, epoch)(np.arange(count)).tolist()) == list(
            range(count)
        )


def test_permutation_of_a_huge_epoch_is_uniform():
    count = 10**10
    permutation = FeistelPermutation(count, 1337, 0)
    places = np.random.default_rng(0).integers(0, count, 50_000)
    found = permutation(places)
    assert np.array_equal(found[17:23], permutation(places[17:23]))
    assert 0 <= found.min() <= found.max() < count
    assert len(np.unique(found)) == len(np.unique(places))
    # Neighbors are spread: each of 100 parts gets a hundredth, within five standard deviations.
    neighbors = permutation(np.arange(50_000))
    counts = np.bincount(neighbors // (count // 100), minlength=100)
    assert np.abs(counts - 500).max() < 5 * 500**0.5
    assert abs(np.corrcoef(neighbors[:-1], neighbors[1:])[0, 1]) < 0.02
    assert not np.array_equal(found, FeistelPermutation(count, 1337, 1)(places))
    assert not np.array_equal(found, FeistelPermutation(count, 1338, 0)(places))


def test_permutation_is_the_same_on_every_machine():
    """Also with another version of numpy: runs depend on these numbers."""
    places = np.array([0, 1, 2, 9_765_625_000 - 1])
    assert FeistelPermutation(9_765_625_000, 1337, 0)(places).tolist() == GOLDEN


GOLDEN = [7776894264, 6495100747, 9314612687, 8653850970]


def test_size_decides_between_shuffle_and_permutation(monkeypatch):
    monkeypatch.setattr(shuffle, "MAX_FULL_SHUFFLE", 1_000)
    places = np.arange(1_000)
    shuffled = np.random.default_rng((1, 2)).permutation(1_000)
    assert np.array_equal(shuffle_epoch(1_000, 1, 2)(places), shuffled)
    assert np.array_equal(
        shuffle_epoch(1_001, 1, 2)(places), FeistelPermutation(1_001, 1, 2)(places)
    )
