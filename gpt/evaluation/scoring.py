"""Log-likelihoods of given continuations of given contexts, in batches.

The rules are those of lm-evaluation-harness (EleutherAI; lm_eval/api/model.py and
lm_eval/models/huggingface.py, `loglikelihood`), so that results compare with published ones.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.data.tokenize.tokenizer import END_OF_TEXT, encode
from gpt.errors import BenchmarkError, Problem
from gpt.evaluation.progress import EvaluationProgress, ProgressGenerator, evaluate_in_batches
from gpt.hardware.device import autocast
from gpt.model.base import GPT
from gpt.model.loss import score_tokens


@dataclass(frozen=True, eq=False)
class Continuation:
    """Context and continuation as ids, of which the last `target_length` are to be predicted."""

    ids: NDArray[np.int64]
    target_length: int


@dataclass(frozen=True)
class Score:
    log_likelihood: float
    """Sum over the tokens of the continuation, nats."""
    is_greedy: bool
    """Whether every token of the continuation is the most likely one after those before it."""


def encode_continuation(context: str, text: str) -> Continuation:
    """Tokenize `text` as a continuation of `context`.

    Both are tokenized together, because a word's tokens include the space before it; spaces at the
    end of the context count as part of the text. Only an empty context starts with end-of-text.
    """
    stripped = context.rstrip()
    text = context[len(stripped) :] + text
    both, before = encode(stripped + text), encode(stripped)
    ids = both if before.size else np.concatenate(([END_OF_TEXT], both))
    return Continuation(ids.astype(np.int64), both.size - before.size)


def fingerprint_continuations(continuations: Sequence[Continuation]) -> str:
    """Hash all ids: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for each in continuations:
        digest.update(np.array([len(each.ids), each.target_length], dtype="<i8").tobytes())
        digest.update(each.ids.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def score_continuations(
    model: GPT,
    continuations: Sequence[Continuation],
    batch_size: int,
    dtype: str,
    description: str = "",
) -> ProgressGenerator[list[Score]]:
    """Score continuations, in their order; yields progress after each batch.

    A batch holds continuations of similar length, with at most as many tokens as `batch_size` full
    contexts; only the hidden states that predict a target pass the head. A context that is too
    long loses its beginning. Raises `BenchmarkError` for a continuation longer than the model's
    context, and as `evaluate_in_batches` does.
    """
    block_size = model.config.block_size
    needed = max(each.target_length for each in continuations)
    if needed > block_size:
        rule = f"must be at least {needed}, the length in tokens of the longest continuation"
        remedy = "leave out this benchmark for a model with such a short context"
        raise BenchmarkError(Problem("model.block_size", str(block_size), rule, remedy))
    # Longest first: if any batch is too large for the device, it is the first one.
    order = sorted(range(len(continuations)), key=lambda i: -len(continuations[i].ids))

    def evaluate(tokens_per_batch: int) -> ProgressGenerator[list[Score]]:
        scores: dict[int, Score] = {}
        while len(scores) < len(order):
            longest = _inputs(continuations[order[len(scores)]], block_size).size
            batch = order[len(scores) :][: max(1, tokens_per_batch // longest)]
            found = _score_batch(model, [continuations[i] for i in batch], dtype)
            scores.update(zip(batch, found, strict=True))
            yield EvaluationProgress(description, len(scores), len(order))
        return [scores[i] for i in range(len(order))]

    return evaluate_in_batches(model, evaluate, batch_size * block_size)


def _inputs(each: Continuation, block_size: int) -> NDArray[np.int64]:
    """Return the last `block_size` ids without the final one, which is only predicted."""
    return each.ids[:-1][-block_size:]


def _score_batch(model: GPT, batch: Sequence[Continuation], dtype: str) -> list[Score]:
    """Pad on the right, where causal attention hides the padding from all targets."""
    inputs = [_inputs(each, model.config.block_size) for each in batch]
    padded = torch.zeros(len(batch), max(map(len, inputs)), dtype=torch.int64)
    rows: list[int] = []
    positions: list[int] = []
    for row, (ids, each) in enumerate(zip(inputs, batch, strict=True)):
        padded[row, : ids.size] = torch.from_numpy(ids)
        rows += [row] * each.target_length
        positions += range(ids.size - each.target_length, ids.size)
    targets = torch.from_numpy(np.concatenate([each.ids[-each.target_length :] for each in batch]))
    device = model.head.device
    with autocast(device, dtype):
        hidden = model(padded.to(device))[rows, positions]
        losses, is_greedy = score_tokens(
            hidden, model.head, targets.to(device), model.logit_softcap
        )
    lengths = [each.target_length for each in batch]
    return [
        Score(-float(part.sum(dtype=torch.float64)), bool(greedy.all()))
        for part, greedy in zip(
            losses.cpu().split(lengths), is_greedy.cpu().split(lengths), strict=True
        )
    ]
