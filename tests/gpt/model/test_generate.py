"""Writing with a cache is writing without one, only faster; and the settings mean what they say."""

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


def written(model, sampling, ids=PROMPT, cached=True):
    return list(stream_tokens(model, ids, sampling, cached))


@pytest.mark.parametrize(
    "sampling",
    [
        # More than two blocks: the context is moved several times.
        SamplingParams(max_tokens=3 * BLOCK, temperature=0),
        SamplingParams(max_tokens=3 * BLOCK, temperature=1.0, top_k=0, seed=3),
        SamplingParams(max_tokens=3 * BLOCK, temperature=1.5, top_k=40, top_p=0.9, seed=4),
    ],
)
def test_cached_equals_uncached_token_for_token(model, sampling):
    cached = written(model, sampling)
    assert cached == written(model, sampling, cached=False)
    assert len(cached) > BLOCK
    assert len(set(cached)) > 2


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 1])
def test_prompts_about_and_over_the_block(model, length):
    ids = [(7 * i) % VOCAB_SIZE for i in range(length)]
    assert written(model, GREEDY, ids) == written(model, GREEDY, ids, cached=False)


def test_uncached_is_the_plain_network_on_the_context(model):
    """Before the block is full there is one context: everything."""
    ids = list(PROMPT)
    for token in written(model, GREEDY):
        with torch.no_grad():
            hidden = model(torch.tensor([ids]))[0, -1]
        assert token == int((model.head[:VOCAB_SIZE] @ hidden).argmax())
        ids.append(token)


def test_hidden_states_and_positions_go_on_in_the_cache(model):
    ids = torch.randint(VOCAB_SIZE, (3, BLOCK), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids)
        cache = KVCache(model.config)
        parts = [model(ids[:, :10], cache)]
        parts += [model(ids[:, i : i + 1], cache) for i in range(10, BLOCK)]
    assert cache.length == BLOCK
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


def test_each_token_after_the_first_costs_one_token(model, monkeypatch):
    lengths = []
    real = generation._next_logits

    def counted(network, new, cache):
        lengths.append(new.shape[1])
        return real(network, new, cache)

    monkeypatch.setattr(generation, "_next_logits", counted)
    count = len(written(model, SamplingParams(max_tokens=2 * BLOCK, temperature=0)))
    assert lengths[: BLOCK - len(PROMPT)] == [len(PROMPT)] + [1] * (BLOCK - len(PROMPT) - 1)
    assert sum(length > 1 for length in lengths) <= 2 + count // (BLOCK // 2)


def test_the_context_is_never_short_of_half_a_block():
    for block in (1, 2, 7, 8):
        for length in range(1, 40):
            context = length - generation._window_start(length, block)
            assert context <= block
            assert context == length or context > block // 2


class Fixed:
    """Stands for a network that finds one token after another likeliest, then end-of-text."""

    def __init__(self, monkeypatch, tokens):
        tokens = iter([*tokens, END_OF_TEXT])
        monkeypatch.setattr(
            generation,
            "_next_logits",
            lambda *_: F.one_hot(torch.tensor(next(tokens)), VOCAB_SIZE) * 100.0,
        )


@pytest.mark.parametrize("text", ["naïve 日本語 🙂🙃 done", "plain", "🙂"])
def test_streamed_pieces_are_whole_characters(model, monkeypatch, text):
    tokens = load_tokenizer().encode_ordinary(text)
    Fixed(monkeypatch, tokens)
    pieces = list(stream_text(model, "x", SamplingParams()))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_is_never_finished_is_replaced(model, monkeypatch):
    half = load_tokenizer().encode_ordinary("🙂")[:1]
    Fixed(monkeypatch, half)
    assert list(stream_text(model, "x", SamplingParams())) == [load_tokenizer().decode(half)]


def test_end_of_text_ends_the_text(model, monkeypatch):
    Fixed(monkeypatch, [464, 2068])
    assert generate(model, "x", SamplingParams(max_tokens=9)) == "The quick"
    Fixed(monkeypatch, [464, 2068])
    assert generate(model, "x", SamplingParams(max_tokens=1)) == "The"


def test_the_seed_decides(model):
    texts = [
        generate(model, "The", SamplingParams(temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def drawn(logits, **settings):
    """Which of four tokens are drawn in 200 draws, and how often."""
    padded = torch.full((VOCAB_SIZE,), -1e4)
    padded[:4] = torch.tensor(logits).log()
    generator = torch.Generator().manual_seed(0)
    sampling = SamplingParams(**{"temperature": 1.0, "top_k": 0, **settings})
    tokens = [generation._choose(padded, sampling, generator) for _ in range(200)]
    return torch.bincount(torch.tensor(tokens), minlength=4)


def test_temperature_top_k_and_top_p_choose_among_the_right_tokens():
    odds = [0.1, 0.5, 0.3, 0.1]
    plain = drawn(odds) / 200
    torch.testing.assert_close(plain, torch.tensor(odds), rtol=0, atol=0.1)
    assert drawn(odds, top_k=2).tolist()[0::3] == [0, 0]
    assert drawn(odds, top_k=1).tolist() == [0, 200, 0, 0]
    assert drawn(odds, top_p=0.45).tolist() == [0, 200, 0, 0]
    assert (drawn(odds, top_p=0.75) > 0).tolist() == [False, True, True, False]
    assert drawn(odds, temperature=0).tolist() == [0, 200, 0, 0]
    assert drawn(odds, temperature=1e-30).tolist() == [0, 200, 0, 0]
    assert drawn(odds, temperature=0.5)[1] > drawn(odds)[1]


def test_every_bad_setting_is_told_at_once():
    with pytest.raises(GenerationError, match="5 problems") as caught:
        SamplingParams(max_tokens=-1, temperature=float("nan"), top_k=1.5, top_p=0.0, seed=True)
    assert [problem.key for problem in caught.value.problems] == [
        *("max_tokens", "temperature", "top_k", "top_p", "seed"),
    ]
