"""HellaSwag and LAMBADA against plain scoring with Hugging Face's model."""

from __future__ import annotations

import re

import numpy as np
import polars
import pytest
import torch
from networks import build_hf_gpt2, model_section, randomize_weights

from gpt.data.tokenize.tokenizer import END_OF_TEXT, load_tokenizer
from gpt.errors import BenchmarkError, OutOfMemoryError
from gpt.evaluation import scoring
from gpt.evaluation.benchmark_files import read_hellaswag, read_lambada
from gpt.evaluation.benchmarks import (
    build_hellaswag_requests,
    build_lambada_request,
    evaluate_hellaswag,
    evaluate_lambada,
    preprocess,
)
from gpt.evaluation.progress import run_to_completion
from gpt.evaluation.scoring import encode_continuation, score_continuations
from gpt.model.architectures import build_model

TEXT = """the a man woman dog ball water runs jumps over under slowly then camera shows house tree
naïve 日本 isn't puts takes 42 street, and another looking Bending while"""
WORDS = TEXT.split()


def sentence(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def hellaswag_table(examples, seed=0, longest=13):
    rng = np.random.default_rng(seed)
    return polars.DataFrame(
        {
            "ind": list(range(examples)),
            "activity_label": [sentence(rng, 1, 3) for _ in range(examples)],
            "ctx": [sentence(rng, 2, 25) for _ in range(examples)],
            "endings": [
                [sentence(rng, 1, longest + 1) + "." for _ in range(4)] for _ in range(examples)
            ],
            "label": rng.integers(0, 4, examples),
        }
    )


def lambada_table(examples, seed=0):
    rng = np.random.default_rng(seed)
    texts = [f'"{sentence(rng, 3, 30)}.\n\n{sentence(rng, 2, 9)}' for _ in range(examples)]
    return polars.DataFrame({"text": texts})


def write_parquet(table, path, **settings):
    table.write_parquet(path, **settings)
    return str(path)


@pytest.fixture(scope="module")
def model():
    return randomize_weights(build_model(model_section("gpt2", block_size=64, bias=True))).eval()


@pytest.fixture(scope="module")
def reference(model):
    """Log-likelihood and greedy match of a text after a context, one at a time, no padding."""
    theirs, _ = build_hf_gpt2(model)
    theirs.eval()
    tokenizer = load_tokenizer()

    @torch.no_grad()
    def score(context, text):
        ids = tokenizer.encode_ordinary(context + text)
        count = len(ids) - len(tokenizer.encode_ordinary(context))
        logits = theirs(torch.tensor([ids[-65:-1]])).logits[0, -count:].double()
        wanted = torch.tensor(ids[-count:])
        likelihood = logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
        return likelihood, bool((logits.argmax(-1) == wanted).all())

    return score


def test_hellaswag_equals_reference_per_example(model, reference, tmp_path):
    table = hellaswag_table(40)
    path = write_parquet(table, tmp_path / "h.parquet", row_group_size=7)
    requests = [r for example in read_hellaswag(path) for r in build_hellaswag_requests(example)]
    ours = [
        each.log_likelihood
        for each in run_to_completion(score_continuations(model, requests, 2, "float32"))
    ]
    theirs, plain, normalized = [], [], []
    for row in table.to_dicts():
        query = f"{row['activity_label']}: {row['ctx']}"
        four = np.array([reference(query, f" {ending}")[0] for ending in row["endings"]])
        theirs += four.tolist()
        plain.append(four.argmax() == row["label"])
        per_byte = four / [len(ending.encode()) for ending in row["endings"]]
        normalized.append(per_byte.argmax() == row["label"])
    assert ours == pytest.approx(theirs, rel=0, abs=1e-4)
    result = run_to_completion(evaluate_hellaswag(model, path, 2, "float32"))
    assert result.examples == 40
    assert result.accuracy == pytest.approx(np.mean(plain))
    assert result.normalized_accuracy == pytest.approx(np.mean(normalized))
    assert result.accuracy_error == pytest.approx(np.std(plain, ddof=1) / 40**0.5)
    assert result.normalized_accuracy_error == pytest.approx(np.std(normalized, ddof=1) / 40**0.5)
    assert np.mean(plain) != np.mean(normalized)


def test_lambada_equals_reference_per_example(model, reference, tmp_path):
    table = lambada_table(40)
    # Add a passage that the model itself generates, so that at least one word is correct.
    start = load_tokenizer().encode_ordinary("The man")
    theirs, _ = build_hf_gpt2(model)
    for _ in range(200):
        with torch.no_grad():
            start.append(int(theirs.eval()(torch.tensor([start[-64:]])).logits[0, -1].argmax()))
        context, space, word = load_tokenizer().decode(start).rpartition(" ")
        if space and word and reference(context, f" {word}")[1]:
            break
    table = polars.concat([table, polars.DataFrame({"text": [f"{context} {word}"]})])
    path = write_parquet(table, tmp_path / "l.parquet", row_group_size=9)
    texts = read_lambada(path)
    found = run_to_completion(
        score_continuations(model, [build_lambada_request(t) for t in texts], 2, "float32")
    )
    expected = [
        reference(
            " ".join(t.split(" ")[:-1]).rstrip(), t[len(" ".join(t.split(" ")[:-1]).rstrip()) :]
        )
        for t in table["text"]
    ]
    likelihoods = [likelihood for likelihood, _ in expected]
    assert [each.log_likelihood for each in found] == pytest.approx(likelihoods, rel=0, abs=1e-4)
    assert [each.is_greedy for each in found] == [greedy for _, greedy in expected]
    result = run_to_completion(evaluate_lambada(model, path, 2, "float32"))
    assert result.accuracy == pytest.approx(np.mean([greedy for _, greedy in expected]))
    assert 0 < result.accuracy < 1
    assert result.perplexity == pytest.approx(np.exp(-np.mean(likelihoods)), rel=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
def test_random_model_scores_a_quarter_on_hellaswag(architecture, tmp_path):
    torch.manual_seed(1)
    network = randomize_weights(
        build_model(model_section(architecture, n_embd=16, n_layer=1, block_size=64))
    )
    path = write_parquet(hellaswag_table(200, seed=5, longest=4), tmp_path / "h.parquet")
    result = run_to_completion(evaluate_hellaswag(network, path, 4, "float32"))
    for accuracy in (result.accuracy, result.normalized_accuracy):
        assert accuracy == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / 200) ** 0.5)
    assert network.training


def test_context_too_long_is_cut_at_its_start(model, reference):
    context = " ".join(WORDS * 5)
    [found] = run_to_completion(
        score_continuations(model, [encode_continuation(context, " the dog")], 1, "float32")
    )
    assert found.log_likelihood == pytest.approx(reference(context, " the dog")[0], abs=1e-4)


def test_spaces_belong_to_the_continuation_and_empty_context_is_end_of_text():
    ids = load_tokenizer().encode_ordinary
    request = encode_continuation("The man \n", "runs")
    assert request.ids.tolist() == ids("The man \nruns")
    assert request.target_length == len(ids("The man \nruns")) - len(ids("The man"))
    request = encode_continuation("", "runs")
    assert request.ids.tolist() == [END_OF_TEXT, *ids("runs")]


def test_wikihow_markers_are_removed_as_in_the_harness():
    marked = " How to wait [title] Sit down. [step] Do  nothing [substeps] at all "
    expected = marked.strip().replace(" [title]", ". ")
    expected = re.sub("\\[.*?\\]", "", expected).replace("  ", " ")
    assert preprocess(marked) == expected == "How to wait. Sit down. Do nothing at all"


def test_hellaswag_original_columns_are_read(tmp_path):
    table = hellaswag_table(3).with_columns(
        polars.lit("A man sits.").alias("ctx_a"),
        polars.lit("he").alias("ctx_b"),
        polars.col("label").cast(str),
    )
    examples = read_hellaswag(write_parquet(table, tmp_path / "h.parquet"))
    assert [example.context for example in examples] == ["A man sits. He"] * 3
    assert [example.label for example in examples] == table["label"].cast(int).to_list()


def test_result_does_not_depend_on_batch_size_and_limit_is_respected(model, tmp_path):
    path = write_parquet(hellaswag_table(30), tmp_path / "h.parquet", row_group_size=4)
    steps = list(evaluate_hellaswag(model, path, 1, "float32", limit=10))
    assert len(steps) > 5
    assert (steps[-1].completed, steps[-1].total) == (40, 40)
    one, many = (
        run_to_completion(evaluate_hellaswag(model, path, size, "float32", limit=10))
        for size in (1, 50)
    )
    assert one == many
    assert (
        run_to_completion(evaluate_hellaswag(model, path, 1, "float32", limit=11)).fingerprint
        != one.fingerprint
    )
    assert one.examples == 10


def test_out_of_memory_halves_the_batch(model, tmp_path, monkeypatch, caplog):
    path = write_parquet(lambada_table(30), tmp_path / "l.parquet")
    whole = run_to_completion(evaluate_lambada(model, path, 16, "float32"))
    real, limit = type(model).forward, 3

    def limited(self, ids, cache=None):
        if ids.shape[0] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(self, ids, cache)

    monkeypatch.setattr(type(model), "forward", limited)
    survived = run_to_completion(evaluate_lambada(model, path, 16, "float32"))
    assert survived.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    assert survived.model_copy(update={"perplexity": whole.perplexity}) == whole
    assert "out of memory in evaluation" in caplog.text
    limit = 0
    with pytest.raises(OutOfMemoryError, match="single sequence"):
        run_to_completion(evaluate_lambada(model, path, 16, "float32"))


def test_only_predicted_positions_pass_the_head(model, tmp_path, monkeypatch):
    rows = []
    real = scoring.score_tokens

    def counted(hidden, *rest):
        rows.append(hidden.shape[0])
        return real(hidden, *rest)

    monkeypatch.setattr(scoring, "score_tokens", counted)
    path = write_parquet(lambada_table(20), tmp_path / "l.parquet")
    requests = [build_lambada_request(text) for text in read_lambada(path)]
    run_to_completion(evaluate_lambada(model, path, 2, "float32"))
    assert sum(rows) == sum(request.target_length for request in requests)


def test_ending_longer_than_block_size_is_refused(tmp_path):
    network = build_model(model_section("gpt2", block_size=8))
    path = write_parquet(hellaswag_table(20), tmp_path / "h.parquet")
    with pytest.raises(BenchmarkError, match=r"model.block_size = 8"):
        run_to_completion(evaluate_hellaswag(network, path, 1, "float32"))


class TestFiles:
    def hellaswag_error(self, table, path):
        with pytest.raises(BenchmarkError) as caught:
            read_hellaswag(write_parquet(table, path))
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(BenchmarkError, match=r"none.parquet\n.*cannot be opened"):
            read_lambada(str(tmp_path / "none.parquet"))
        with pytest.raises(BenchmarkError, match="cannot be opened"):
            read_lambada("no-such-store://x/y.parquet")

    def test_invalid_or_truncated_file(self, tmp_path):
        path = tmp_path / "l.parquet"
        path.write_text("no parquet at all")
        with pytest.raises(BenchmarkError, match="is not a complete Parquet file"):
            read_lambada(str(path))
        write_parquet(lambada_table(9), path)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(BenchmarkError, match="is not a complete Parquet file"):
            read_lambada(str(path))

    def test_all_missing_columns_are_reported(self, tmp_path):
        message = self.hellaswag_error(lambada_table(3), tmp_path / "h.parquet")
        for column in ("activity_label", "ctx", "endings", "label"):
            assert f"= {column}\n" in message
        assert "the file has text" in message

    def test_no_rows(self, tmp_path):
        assert "has no rows" in self.hellaswag_error(hellaswag_table(0), tmp_path / "h.parquet")

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("label", polars.lit(4)),
            ("label", polars.lit(None, polars.Int64)),
            ("endings", polars.col("endings").list.head(3)),
            ("endings", polars.lit("text")),
            ("ctx", polars.lit(7)),
        ],
    )
    def test_invalid_values(self, tmp_path, column, value):
        table = hellaswag_table(3).with_columns(value.alias(column))
        assert f"row 0, column {column}" in self.hellaswag_error(table, tmp_path / "h.parquet")

    @pytest.mark.parametrize("text", ["word", "ends in a space ", None])
    def test_passage_without_a_last_word(self, tmp_path, text):
        table = polars.concat([lambada_table(2), polars.DataFrame({"text": [text]}, {"text": str})])
        with pytest.raises(BenchmarkError, match="row 2, column text"):
            read_lambada(write_parquet(table, tmp_path / "l.parquet"))
