"""How likely a model finds given texts after given contexts, many at once.

The rules are those of lm-evaluation-harness (EleutherAI; lm_eval/api/model.py and
lm_eval/models/huggingface.py, `loglikelihood`), so that the figures compare with those published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.data.tokenize.tokenizer import END_OF_TEXT, encode
from gpt.errors import BenchmarkError, Problem
from gpt.evaluation.batch_size import halve_batch_size
from gpt.evaluation.progress import EvaluationProgress, ProgressGenerator
from gpt.hardware.device import autocast, is_out_of_memory
from gpt.model.base import GPT
from gpt.model.loss import token_scores


@dataclass(frozen=True, eq=False)
class Continuation:
    """Ids, the last `count` of which are to be predicted."""

    ids: NDArray[np.int64]
    count: int


@dataclass(frozen=True)
class Score:
    log_likelihood: float
    """Of all tokens of the continuation together, nats."""
    is_greedy: bool
    """Whether each of them is the likeliest token after those before it."""


def encode_continuation(context: str, text: str) -> Continuation:
    """`text` after `context`, tokenised as one, because a word's tokens include the space before
    it. Spaces at the end of the context count as the text's. No end-of-text stands before it,
    unless there is no context at all."""
    kept = context.rstrip()
    text = context[len(kept) :] + text
    both, before = encode(kept + text), encode(kept)
    ids = both if before.size else np.concatenate(([END_OF_TEXT], both))
    return Continuation(ids.astype(np.int64), both.size - before.size)


def fingerprint(continuations: Sequence[Continuation]) -> str:
    """Of all their ids: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for each in continuations:
        digest.update(np.array([len(each.ids), each.count], dtype="<i8").tobytes())
        digest.update(each.ids.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def score_continuations(
    model: GPT, continuations: Sequence[Continuation], batch_size: int, dtype: str, what: str = ""
) -> ProgressGenerator[list[Score]]:
    """Their scores, in their order, as the generator's value; yields after every batch.

    A batch holds continuations of about one length, at most as many tokens as `batch_size`
    sequences of the model's context; only the hidden states of what is predicted meet the head.
    A context that is too long loses its beginning. Where the device runs out of memory, goes on
    with smaller batches. Leaves the model in the mode it was in. Raises `BenchmarkError` for a
    continuation longer than the model's context, `OutOfMemoryError` where one sequence is too many.
    """
    block_size = model.config.block_size
    _refuse_too_long(continuations, block_size)
    # The longest first: if a batch is too large for the device, it is the first.
    waiting = sorted(range(len(continuations)), key=lambda i: -len(continuations[i].ids))
    scores: dict[int, Score] = {}
    tokens_at_once = batch_size * block_size
    was_training = model.training
    model.eval()
    try:
        while waiting:
            longest = _inputs_of(continuations[waiting[0]], block_size).size
            batch = waiting[: max(1, tokens_at_once // longest)]
            found = _scores_or_none(model, [continuations[i] for i in batch], dtype)
            if found is None:
                tokens_at_once = halve_batch_size(len(batch)) * longest
                continue
            scores.update(zip(batch, found, strict=True))
            waiting = waiting[len(batch) :]
            yield EvaluationProgress(what, len(scores), len(continuations))
    finally:
        model.train(was_training)
    return [scores[i] for i in range(len(continuations))]


def _refuse_too_long(continuations: Sequence[Continuation], block_size: int) -> None:
    longest = max(each.count for each in continuations)
    if longest > block_size:
        raise BenchmarkError(
            Problem(
                "model.block_size",
                str(block_size),
                f"must be at least {longest}, the tokens of the longest text to be predicted",
                "leave this benchmark out for a model with so short a context",
            )
        )


def _inputs_of(each: Continuation, block_size: int) -> NDArray[np.int64]:
    """All ids but the last, which is only predicted; the last `block_size` of those."""
    return each.ids[:-1][-block_size:]


def _scores_or_none(model: GPT, batch: Sequence[Continuation], dtype: str) -> list[Score] | None:
    """None where the device runs out of memory."""
    try:
        return _scores(model, batch, dtype)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return None


@torch.no_grad()
def _scores(model: GPT, batch: Sequence[Continuation], dtype: str) -> list[Score]:
    """Padded on the right, where nothing that counts looks."""
    inputs = [_inputs_of(each, model.config.block_size) for each in batch]
    padded = torch.zeros(len(batch), max(map(len, inputs)), dtype=torch.int64)
    rows: list[int] = []
    positions: list[int] = []
    for row, (ids, each) in enumerate(zip(inputs, batch, strict=True)):
        padded[row, : ids.size] = torch.from_numpy(ids)
        rows += [row] * each.count
        positions += range(ids.size - each.count, ids.size)
    targets = torch.from_numpy(np.concatenate([each.ids[-each.count :] for each in batch]))
    device = model.head.device
    with autocast(device, dtype):
        predicting = model(padded.to(device))[rows, positions]
        losses, likeliest = token_scores(
            predicting, model.head, targets.to(device), model.logit_softcap
        )
    counts = [each.count for each in batch]
    return [
        Score(-float(part.sum(dtype=torch.float64)), bool(hits.all()))
        for part, hits in zip(
            losses.cpu().split(counts), likeliest.cpu().split(counts), strict=True
        )
    ]
