"""Text generation: sample one token after another.

Temperature and top-k as in GPT-2's own samples; top-p is nucleus sampling (Holtzman et al. 2019,
"The Curious Case of Neural Text Degeneration", arXiv:1904.09751).
"""

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.data.tokenize.tokenizer import END_OF_TEXT, VOCAB_SIZE, encode, load_tokenizer
from gpt.errors import GenerationError, Problem
from gpt.model.base import GPT
from gpt.model.kv_cache import KVCache
from gpt.model.loss import compute_logits


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; the same seed gives the same text on the same device.

    Raises `GenerationError` that lists every invalid value.
    """

    max_tokens: int = 64
    """Most tokens to generate; an end-of-text token stops earlier."""
    temperature: float = 0.8
    """0: always the most likely token."""
    top_k: int = 50
    """Sample from the k most likely tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest most likely tokens whose probabilities add up to at least this."""
    seed: int = 1337

    def __post_init__(self) -> None:
        problems = [
            Problem(name, repr(value), *_RULES[name])
            for name, value in vars(self).items()
            if not _is_allowed(name, value)
        ]
        if problems:
            raise GenerationError(*problems)


_COUNT = "must be an integer of at least 0"
_RULES = {
    "max_tokens": (_COUNT, "set the most tokens to generate, e.g. 64"),
    "temperature": ("must be a number of at least 0", "use 0 for the likeliest text, or e.g. 0.8"),
    "top_k": (_COUNT, "use 0 to sample from all tokens, or e.g. 50"),
    "top_p": ("must be above 0 and at most 1", "use 1 to sample from all tokens, or e.g. 0.95"),
    "seed": ("must be an integer from 0 to 2^63 - 1", "use another seed, e.g. 1337"),
}


def _is_allowed(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if name in ("max_tokens", "top_k", "seed") and not isinstance(value, int):
        return False
    if name == "top_p":
        return 0 < value <= 1
    return 0 <= value < 2**63


def generate(model: GPT, prompt: str, sampling: SamplingParams) -> str:
    """Generate the text that follows `prompt`, which is read as the beginning of a document.

    The model must be in evaluation mode, as `gpt.model.io.load_model` returns it.
    """
    return "".join(stream_text(model, prompt, sampling))


def stream_text(model: GPT, prompt: str, sampling: SamplingParams) -> Iterator[str]:
    """Generate text piece by piece, never splitting a character; invalid UTF-8 becomes U+FFFD."""
    tokenizer = load_tokenizer()
    # In training, every document follows an end-of-text token.
    ids = [END_OF_TEXT, *encode(prompt).tolist()]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in stream_tokens(model, ids, sampling):
        if piece := decoder.decode(tokenizer.decode_single_token_bytes(token)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


@torch.no_grad()
def stream_tokens(
    model: GPT, ids: Sequence[int], sampling: SamplingParams, use_cache: bool = True
) -> Iterator[int]:
    """Generate the ids that follow `ids`, at most `max_tokens`, up to an end-of-text token.

    When the context is full, its older half is dropped and the rest is recomputed, so that a token
    of a long text costs little more than one of a short text. `use_cache=False` computes every
    token from its whole context: the same tokens, slower.
    """
    assert ids, "the prompt must have at least one token"
    assert not model.training, "dropout would change the text: call model.eval()"
    device = model.head.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    ids = list(ids)
    start, cache = 0, KVCache(model.config)
    for _ in range(sampling.max_tokens):
        before, start = start, _window_start(len(ids), model.config.block_size)
        if start != before or not use_cache:
            cache = KVCache(model.config)
        new = torch.tensor([ids[start + cache.length :]], device=device)
        token = _sample(_next_logits(model, new, cache), sampling, generator)
        if token == END_OF_TEXT:
            return
        ids.append(token)
        yield token


def _window_start(length: int, block_size: int) -> int:
    """Return where the context of token number `length` starts; it moves by half a block."""
    step = max(1, block_size // 2)
    return max(0, math.ceil((length - block_size) / step)) * step


def _next_logits(model: GPT, new: Tensor, cache: KVCache) -> Tensor:
    """Compute logits, (VOCAB_SIZE,) float32, without the head's padding rows."""
    last = model(new, cache)[:, -1]
    head = model.head[:VOCAB_SIZE].to(last.dtype)
    return compute_logits(last, head, model.logit_softcap)[0][0]


def _sample(logits: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    # Shift the maximum to zero first, or a tiny temperature would give infinities.
    scaled = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < VOCAB_SIZE:
        scaled[scaled < torch.topk(scaled, sampling.top_k).values[-1]] = -torch.inf
    probabilities = torch.softmax(scaled, dim=0)
    if sampling.top_p < 1:
        ranked = probabilities.sort(descending=True).values
        cumulative_before = ranked.cumsum(0) - ranked
        probabilities[probabilities < ranked[cumulative_before < sampling.top_p][-1]] = 0
    # Sample in the order of ids: rounding, which swaps neighbours in an order by probability, then
    # hardly ever changes the token that a seed selects.
    return int(torch.multinomial(probabilities, 1, generator=generator))
