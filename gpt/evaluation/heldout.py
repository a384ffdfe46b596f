"""Loss on held-out text: the validation slice, which is the same for every config, or your own."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.artifacts import DatasetManifest, HeldoutLoss
from gpt.config.schema import RunConfig
from gpt.data.loader import Batch, SequenceDataset, iterate_validation_batches
from gpt.data.tokenize.tokenizer import END_OF_TEXT, RANKS_SHA256, encode, load_token_lengths
from gpt.evaluation.progress import (
    EvaluationProgress,
    ProgressGenerator,
    evaluate_in_batches,
    run_to_completion,
)
from gpt.hardware.device import autocast
from gpt.model.base import GPT
from gpt.model.loss import score_tokens

POSITION_BUCKETS = 16
"""Nearly equal parts of the context; fewer if it has fewer positions."""


def heldout_loss(
    model: GPT, config: RunConfig, dataset: DatasetManifest, tokens: int | None = None
) -> HeldoutLoss:
    """Compute what `evaluate_heldout` computes, without progress."""
    return run_to_completion(evaluate_heldout(model, config, dataset, tokens))


def evaluate_heldout(
    model: GPT, config: RunConfig, dataset: DatasetManifest, tokens: int | None = None
) -> ProgressGenerator[HeldoutLoss]:
    """Compute the loss over the first `tokens` validation tokens (default: `evaluation.tokens`).

    Each token is predicted once, from the tokens before it in its own sequence. The model keeps
    its mode. If the device runs out of memory, the batch size is halved, down to one sequence,
    with the same result. Raises `OutOfMemoryError` if a single sequence is too large.
    """
    count = config.evaluation.tokens if tokens is None else tokens
    sequences = SequenceDataset(dataset, dataset.validation, model.config.block_size)

    def evaluate(batch_size: int) -> ProgressGenerator[HeldoutLoss]:
        batches = iterate_validation_batches(sequences, count, batch_size)
        return _evaluate(model, batches, config.training.dtype, count, dataset.ranks_sha256)

    return evaluate_in_batches(model, evaluate, config.evaluation.batch_size)


def score_texts(
    model: GPT, texts: Iterable[str], batch_size: int = 8, dtype: str = "bfloat16"
) -> HeldoutLoss:
    """Compute the loss of a model on your own texts.

    The texts are joined as in training, with an end-of-text token before, between and after them,
    and cut into sequences of the model's `block_size`; the last one may be shorter. Score a file
    with `score_texts(model, [Path("book.txt").read_text()])`.

    Args:
        model: A network as `gpt.model.io.load_model` returns it, on any device; keeps its mode.
        texts: Documents.
        batch_size: Sequences per forward pass; halved if the device runs out of memory.
        dtype: Precision of matrix products on a GPU, as `training.dtype`; a CPU uses float32.
    """
    joined = [torch.tensor([END_OF_TEXT])]
    for text in texts:
        joined += [torch.from_numpy(encode(text).astype(np.int64)), joined[0]]
    ids = torch.cat(joined)
    assert len(ids) > 1, "there are no texts to score"
    length = (len(ids) - 1) // model.config.block_size * model.config.block_size

    def batches(size: int) -> Iterator[Batch]:
        pairs = torch.stack((ids[:-1], ids[1:]))
        full = pairs[:, :length].reshape(2, -1, model.config.block_size)
        for batch in (*full.split(size, dim=1), pairs[:, None, length:]):
            if batch.numel():
                yield batch[0], batch[1]

    def evaluate(size: int) -> ProgressGenerator[HeldoutLoss]:
        return _evaluate(model, batches(size), dtype, len(ids) - 1, RANKS_SHA256)

    return run_to_completion(evaluate_in_batches(model, evaluate, batch_size))


def _evaluate(
    model: GPT, batches: Iterable[Batch], dtype: str, tokens: int, ranks_sha256: str
) -> ProgressGenerator[HeldoutLoss]:
    device, block_size = model.head.device, model.config.block_size
    sums: list[torch.Tensor] = []
    lengths: list[int] = []
    by_position = torch.zeros(block_size, dtype=torch.float64, device=device)
    text_bytes = completed = 0
    digest = hashlib.sha256(ranks_sha256.encode())
    for inputs, targets in batches:
        with autocast(device, dtype):
            hidden = model(inputs.to(device))
            losses, _ = score_tokens(hidden, model.head, targets.to(device), model.logit_softcap)
        sums.append(losses.sum(dim=1, dtype=torch.float64))
        lengths += [targets.shape[1]] * len(targets)
        by_position[: targets.shape[1]] += losses.sum(dim=0, dtype=torch.float64)
        text_bytes += int(load_token_lengths()[targets.numpy()].sum())
        digest.update(targets.numpy().astype("<u2").tobytes())
        completed += targets.numel()
        yield EvaluationProgress("validation loss", completed, tokens)
    sequence_sums = torch.cat(sums).cpu().numpy()
    sequence_losses = sequence_sums / np.array(lengths)
    total = float(sequence_sums.sum())
    positions = np.arange(max(lengths))
    sequences_at = len(lengths) - np.searchsorted(np.sort(lengths), positions, side="right")
    at_position = by_position[: len(positions)].cpu().numpy() / sequences_at
    buckets = np.array_split(at_position, min(POSITION_BUCKETS, len(positions)))
    return HeldoutLoss(
        tokens=completed,
        loss=total / completed,
        perplexity=math.exp(min(total / completed, 700.0)),
        bits_per_byte=total / math.log(2) / max(1, text_bytes),
        standard_error=standard_error(sequence_losses),
        loss_by_position=tuple(float(bucket.mean()) for bucket in buckets),
        sequence_losses=tuple(sequence_losses.tolist()),
        slice_fingerprint=digest.hexdigest()[:16],
    )


def standard_error(values: NDArray[Any]) -> float | None:
    """Return the sample standard deviation divided by the square root of the count; None for one
    value."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
