"""Text generation: the KV cache, the sliding context, streaming and the sampling parameters."""

import pytest
import torch
from torch.nn import functional as F

from gpt.config.schema import ModelSection
from gpt.data.tokenize.tokenizer import END_OF_TEXT, VOCAB_SIZE, load_tokenizer
from gpt.errors import GenerationError
from gpt.model import generate as generation
from gpt.model.architectures import build_model
from gpt.model.generate import SamplingParams, generate, stream_text, stream_tokens
from gpt.model.kv_cache import KVCache

BLOCK = 24
PROMPT = [END_OF_TEXT, 464, 2068, 7586, 21831]
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture(scope="module", params=["gpt2", "nanochat"])
def model(request):
    """Weights large enough that the context decides what comes next."""
    section = ModelSection(
        architecture=request.param, n_layer=2, n_head=2, n_embd=32, block_size=BLOCK
    )
    network = build_model(section).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def generate_ids(model, sampling, ids=PROMPT, use_cache=True):
    return list(stream_tokens(model, ids, sampling, use_cache))


@pytest.mark.parametrize(
    "sampling",
    [
        # More than two blocks, so that the context moves several times.
        SamplingParams(max_tokens=3 * BLOCK, temperature=0),
        SamplingParams(max_tokens=3 * BLOCK, temperature=1.0, top_k=0, seed=3),
        SamplingParams(max_tokens=3 * BLOCK, temperature=1.5, top_k=40, top_p=0.9, seed=4),
    ],
)
def test_tokens_with_cache_equal_tokens_without(model, sampling):
    cached = generate_ids(model, sampling)
    assert cached == generate_ids(model, sampling, use_cache=False)
    assert len(cached) > BLOCK
    assert len(set(cached)) > 2


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 1])
def test_prompt_longer_than_block_size_generates_the_same_with_cache(model, length):
    ids = [(7 * i) % VOCAB_SIZE for i in range(length)]
    assert generate_ids(model, GREEDY, ids) == generate_ids(model, GREEDY, ids, use_cache=False)


def test_tokens_without_cache_are_the_argmax_of_a_plain_forward(model):
    """Until the block is full, the context is the whole sequence."""
    ids = list(PROMPT)
    for token in generate_ids(model, GREEDY):
        with torch.no_grad():
            hidden = model(torch.tensor([ids]))[0, -1]
        assert token == int((model.head[:VOCAB_SIZE] @ hidden).argmax())
        ids.append(token)


def test_forward_in_parts_with_cache_equals_one_forward(model):
    ids = torch.randint(VOCAB_SIZE, (3, BLOCK), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids)
        cache = KVCache(model.config)
        parts = [model(ids[:, :10], cache)]
        parts += [model(ids[:, i : i + 1], cache) for i in range(10, BLOCK)]
    assert cache.length == BLOCK
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


def test_cached_generation_computes_one_token_per_step(model, monkeypatch):
    lengths = []
    real = generation._next_logits

    def counted(network, new, cache):
        lengths.append(new.shape[1])
        return real(network, new, cache)

    monkeypatch.setattr(generation, "_next_logits", counted)
    count = len(generate_ids(model, SamplingParams(max_tokens=2 * BLOCK, temperature=0)))
    assert lengths[: BLOCK - len(PROMPT)] == [len(PROMPT)] + [1] * (BLOCK - len(PROMPT) - 1)
    assert sum(length > 1 for length in lengths) <= 2 + count // (BLOCK // 2)


def test_context_keeps_at_least_half_a_block():
    for block in (1, 2, 7, 8):
        for length in range(1, 40):
            context = length - generation._window_start(length, block)
            assert context <= block
            assert context == length or context > block // 2


class FixedTokens:
    """Make the model predict the given tokens, then end-of-text."""

    def __init__(self, monkeypatch, tokens):
        tokens = iter([*tokens, END_OF_TEXT])
        monkeypatch.setattr(
            generation,
            "_next_logits",
            lambda *_: F.one_hot(torch.tensor(next(tokens)), VOCAB_SIZE) * 100.0,
        )


@pytest.mark.parametrize("text", ["naïve 日本語 🙂🙃 done", "plain", "🙂"])
def test_streaming_never_splits_a_character(model, monkeypatch, text):
    tokens = load_tokenizer().encode_ordinary(text)
    FixedTokens(monkeypatch, tokens)
    pieces = list(stream_text(model, "x", SamplingParams()))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_incomplete_character_at_the_end_is_replaced(model, monkeypatch):
    half = load_tokenizer().encode_ordinary("🙂")[:1]
    FixedTokens(monkeypatch, half)
    assert list(stream_text(model, "x", SamplingParams())) == [load_tokenizer().decode(half)]


def test_generation_stops_at_end_of_text_or_max_tokens(model, monkeypatch):
    FixedTokens(monkeypatch, [464, 2068])
    assert generate(model, "x", SamplingParams(max_tokens=9)) == "The quick"
    FixedTokens(monkeypatch, [464, 2068])
    assert generate(model, "x", SamplingParams(max_tokens=1)) == "The"


def test_same_seed_gives_same_text(model):
    texts = [
        generate(model, "The", SamplingParams(temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def sample_counts(logits, **settings):
    """Count how often each of four tokens is sampled in 200 draws."""
    padded = torch.full((VOCAB_SIZE,), -1e4)
    padded[:4] = torch.tensor(logits).log()
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(**{"temperature": 1.0, "top_k": 0, **settings})
    tokens = [generation._sample(padded, sampling, generator) for _ in range(200)]
    return torch.bincount(torch.tensor(tokens), minlength=4)


def test_temperature_top_k_and_top_p_restrict_the_sampled_tokens():
    odds = [0.1, 0.5, 0.3, 0.1]
    plain = sample_counts(odds) / 200
    torch.testing.assert_close(plain, torch.tensor(odds), rtol=0, atol=0.1)
    assert sample_counts(odds, top_k=2).tolist()[0::3] == [0, 0]
    assert sample_counts(odds, top_k=1).tolist() == [0, 200, 0, 0]
    assert sample_counts(odds, top_p=0.45).tolist() == [0, 200, 0, 0]
    assert (sample_counts(odds, top_p=0.75) > 0).tolist() == [False, True, True, False]
    assert sample_counts(odds, temperature=0).tolist() == [0, 200, 0, 0]
    assert sample_counts(odds, temperature=1e-30).tolist() == [0, 200, 0, 0]
    assert sample_counts(odds, temperature=0.5)[1] > sample_counts(odds)[1]


def test_all_invalid_sampling_params_are_reported_at_once():
    with pytest.raises(GenerationError, match="5 problems") as caught:
        SamplingParams(max_tokens=-1, temperature=float("nan"), top_k=1.5, top_p=0.0, seed=True)
    assert [problem.key for problem in caught.value.problems] == [
        *("max_tokens", "temperature", "top_k", "top_p", "seed"),
    ]
