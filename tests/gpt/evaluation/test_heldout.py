"""Held-out loss against a plain computation of each of its numbers."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training_data import make_token_dataset, tiny_config

from gpt.artifacts import EvaluationReport
from gpt.data.loader import SequenceDataset
from gpt.data.tokenize.tokenizer import END_OF_TEXT, load_tokenizer
from gpt.evaluation.heldout import heldout_loss, score_texts
from gpt.model.architectures import build_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_token_dataset(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = build_model(tiny_config("unused").model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network


@pytest.fixture(scope="module")
def plain_losses(model, dataset):
    """Losses of the 640-token slice, (20 sequences, 32), from torch's cross-entropy."""
    inputs, targets = SequenceDataset(dataset, dataset.validation, 32).read(np.arange(20))
    model.eval()
    with torch.no_grad():
        logits = model(inputs) @ model.head.T
    model.train()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(20, 32)


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_every_number_equals_its_plain_computation(model, dataset, plain_losses, batch_size):
    held = heldout_loss(model, tiny_config("x", evaluation__batch_size=batch_size), dataset)
    assert model.training
    assert held.tokens == 640
    assert held.loss == pytest.approx(plain_losses.mean().item(), rel=1e-6)
    assert held.perplexity == pytest.approx(math.exp(held.loss))
    of_sequences = plain_losses.mean(dim=1)
    assert held.standard_error == pytest.approx(of_sequences.std().item() / 20**0.5, rel=1e-4)
    of_positions = plain_losses.mean(dim=0).view(16, 2).mean(dim=1)
    assert held.loss_by_position == pytest.approx(of_positions.tolist(), rel=1e-5)


def test_fewer_tokens_are_the_start_of_the_slice(model, dataset, plain_losses):
    held = heldout_loss(model, tiny_config("x"), dataset, tokens=160)
    assert (held.tokens, len(held.sequence_losses)) == (160, 5)
    assert held.loss == pytest.approx(plain_losses[:5].mean().item(), rel=1e-6)
    assert held.sequence_losses == pytest.approx(plain_losses[:5].mean(dim=1).tolist(), rel=1e-6)


def test_loss_by_position_if_block_size_is_not_a_multiple_of_sixteen(dataset):
    for block_size, buckets in ((37, 16), (5, 5)):
        config = tiny_config("x", model__block_size=block_size, evaluation__tokens=400)
        held = heldout_loss(build_model(config.model), config, dataset)
        assert len(held.loss_by_position) == buckets
        assert sum(held.loss_by_position) / buckets == pytest.approx(held.loss, rel=0.01)


def test_single_sequence_has_no_standard_error(model, dataset):
    held = heldout_loss(model, tiny_config("x", evaluation__tokens=32), dataset)
    assert held.standard_error is None


def test_fingerprint_depends_on_the_predicted_tokens_alone(model, dataset, tmp_path):
    def fingerprint(of=dataset, network=model, **changes):
        return heldout_loss(network, tiny_config("x", **changes), of).slice_fingerprint

    whole = fingerprint()
    assert len(whole) == 16
    assert fingerprint(evaluation__batch_size=7) == whole
    half = {"model__block_size": 16}
    assert fingerprint(network=build_model(tiny_config("x", **half).model), **half) == whole
    assert fingerprint(evaluation__tokens=320) != whole
    longer = make_token_dataset(tmp_path / "other", validation_tokens=5_000)
    assert fingerprint(longer) != whole


@pytest.mark.parametrize("texts", [["The man."], ["A dog jumps. " * 20, "", "The man runs."]])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_own_texts_are_scored_token_by_token(model, texts, batch_size):
    encode = load_tokenizer().encode_ordinary
    ids = [END_OF_TEXT]
    for text in texts:
        ids += [*encode(text), END_OF_TEXT]
    expected = []
    model.eval()
    for start in range(0, len(ids) - 1, 32):
        inputs, targets = torch.tensor([ids[start : start + 32]]), ids[start + 1 : start + 33]
        with torch.no_grad():
            logits = (model(inputs) @ model.head.T)[0, : len(targets)]
        expected += F.cross_entropy(logits, torch.tensor(targets), reduction="none").tolist()
    model.train()
    held = score_texts(model, texts, batch_size)
    assert model.training
    assert held.tokens == len(expected) == len(ids) - 1
    assert held.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert held.sequence_losses[-1] == pytest.approx(
        np.mean(expected[(len(expected) - 1) // 32 * 32 :]), rel=1e-5
    )
    assert len(held.loss_by_position) == min(16, len(expected))
    text_bytes = sum(len(text.encode()) for text in texts)
    assert held.bits_per_byte == pytest.approx(np.sum(expected) / math.log(2) / text_bytes)


def test_reports_of_earlier_versions_are_read():
    old = {"step": 3, "tokens": 5, "loss": 3.0, "perplexity": 20.0, "bits_per_byte": 1.5}
    report = EvaluationReport(**json.loads(json.dumps(old | {"samples": []})))
    assert (report.standard_error, report.loss_by_position) == (None, ())
    new = report.model_copy(update={"standard_error": 0.1, "loss_by_position": (3.5, 2.5)})
    assert EvaluationReport(**json.loads(new.model_dump_json())) == new
