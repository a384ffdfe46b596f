"""Text from a model: sampling one token after another.

Temperature and top-k as in GPT-2's own samples; top-p is nucleus sampling (Holtzman et al. 2019,
"The Curious Case of Neural Text Degeneration", arXiv:1904.09751).
"""

from __future__ import annotations

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
    """How the next token is chosen. Raises `GenerationError` with every value that cannot be.

    A token is drawn from the `top_k` likeliest (0: from all), of those from the fewest that have
    `top_p` of the probability together, at `temperature` (0: always the likeliest). The same seed
    gives the same text on the same device.
    """

    max_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 1337

    def __post_init__(self) -> None:
        problems = [
            Problem(name, repr(value), *_LIMITS[name])
            for name, value in vars(self).items()
            if not _is_allowed(name, value)
        ]
        if problems:
            raise GenerationError(*problems)


_WHOLE = "must be a whole number, 0 or more"
_LIMITS = {
    "max_tokens": (_WHOLE, "give the most tokens to write, as 64"),
    "temperature": ("must be a number, 0 or more", "give 0 for the likeliest text, or about 0.8"),
    "top_k": (_WHOLE, "give 0 to draw from all tokens, or about 50"),
    "top_p": ("must be over 0, at most 1", "give 1 to draw from all tokens, or about 0.95"),
    "seed": ("must be a whole number from 0 to 2^63 - 1", "give another seed, as 1337"),
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
    """The text that follows `prompt`, which is taken as the beginning of a document."""
    return "".join(stream_text(model, prompt, sampling))


def stream_text(model: GPT, prompt: str, sampling: SamplingParams) -> Iterator[str]:
    """`generate` piece by piece, a character never cut; bytes that are no UTF-8 become U+FFFD."""
    tokenizer = load_tokenizer()
    # A document begins with end-of-text.
    ids = [END_OF_TEXT, *encode(prompt).tolist()]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in stream_tokens(model, ids, sampling):
        if piece := decoder.decode(tokenizer.decode_single_token_bytes(token)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


@torch.no_grad()
def stream_tokens(
    model: GPT, ids: Sequence[int], sampling: SamplingParams, cached: bool = True
) -> Iterator[int]:
    """The ids that follow `ids` (one at least): at most `max_tokens`, ended by an end-of-text,
    which is not given. The model must be in its evaluation mode.

    Where the context is full, its older half is dropped and the rest computed anew, so that a long
    text costs little more a token than a short one. `cached` false computes every token from its
    whole context: the same tokens, slower.
    """
    assert ids, "something must stand before the first token"
    assert not model.training, "dropout would spoil the text: call model.eval()"
    device = model.head.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    ids = list(ids)
    start, cache = 0, KVCache(model.config)
    for _ in range(sampling.max_tokens):
        before, start = start, _window_start(len(ids), model.config.block_size)
        if start != before or not cached:
            cache = KVCache(model.config)
        new = torch.tensor([ids[start + cache.length :]], device=device)
        token = _choose(_next_logits(model, new, cache), sampling, generator)
        if token == END_OF_TEXT:
            return
        ids.append(token)
        yield token


def _window_start(length: int, block_size: int) -> int:
    """Where the context of token number `length` begins: it moves by half a block at a time."""
    step = max(1, block_size // 2)
    return max(0, math.ceil((length - block_size) / step)) * step


def _next_logits(model: GPT, new: Tensor, cache: KVCache) -> Tensor:
    """(VOCAB_SIZE,), float32; rows of the head past the vocabulary are padding that no text has."""
    last = model(new, cache)[:, -1]
    head = model.head[:VOCAB_SIZE].to(last.dtype)
    return compute_logits(last, head, model.logit_softcap)[0][0]


def _choose(logits: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The largest as zero before the division: a tiny temperature would give infinities.
    scaled = (logits - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < VOCAB_SIZE:
        scaled[scaled < torch.topk(scaled, sampling.top_k).values[-1]] = -torch.inf
    probabilities = torch.softmax(scaled, dim=0)
    if sampling.top_p < 1:
        best = probabilities.sort(descending=True).values
        likelier = best.cumsum(0) - best
        probabilities[probabilities < best[likelier < sampling.top_p][-1]] = 0
    # In the order of ids, so that rounding, which swaps neighbours in an order by probability,
    # hardly ever changes what a seed draws.
    return int(torch.multinomial(probabilities, 1, generator=generator))
