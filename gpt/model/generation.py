"""Text from a model: sampling one token after another."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt.data.tokenizer import END_OF_TEXT, VOCABULARY, load_tokenizer
from gpt.model.loss import capped_logits
from gpt.model.transformer import GPT


@torch.no_grad()
def generate(
    model: GPT, prompt: str, max_tokens: int, seed: int, temperature: float = 0.8, top_k: int = 50
) -> str:
    """The text that follows `prompt`: at most `max_tokens` tokens, ended early by end-of-text.

    The same seed gives the same text on the same device. Contexts longer than the model's block
    lose their beginning.
    """
    tokenizer = load_tokenizer()
    device = model.head.device
    generator = torch.Generator(device).manual_seed(seed)
    # A document begins with end-of-text, so a prompt is the beginning of a document.
    ids = [END_OF_TEXT, *tokenizer.encode_ordinary(prompt)]
    start = len(ids)
    for _ in range(max_tokens):
        context = torch.tensor([ids[-model.config.block_size :]], device=device)
        last = model(context)[:, -1]
        logits, _ = capped_logits(last, model.head.to(last.dtype), model.logit_softcap)
        # Rows past the vocabulary are padding: no text has them.
        token = _sample(logits[0, :VOCABULARY], temperature, top_k, generator)
        if token == END_OF_TEXT:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


def _sample(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    best, ids = torch.topk(logits, min(top_k, logits.shape[0]))
    probabilities = torch.softmax(best / temperature, dim=0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)].item())
