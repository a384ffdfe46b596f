"""Loss on text that was kept out of training: one fixed slice, the same for every config."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.loader import Batch, SequenceDataset, iterate_validation_batches
from gpt.data.tokenize.tokenizer import VOCAB_SIZE, load_tokenizer
from gpt.evaluation.batch_size import halve_batch_size
from gpt.evaluation.progress import EvaluationProgress, ProgressGenerator, run_to_completion
from gpt.hardware.device import autocast, is_out_of_memory
from gpt.model.base import GPT
from gpt.model.loss import token_losses

POSITION_BUCKETS = 16


@dataclass(frozen=True)
class HeldoutLoss:
    """`loss` is the mean over `tokens` predicted tokens, nats; `bits_per_byte` is over the UTF-8
    bytes that those tokens stand for (end-of-text stands for none), so that models with
    different tokenizers compare."""

    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float
    standard_error: float | None = None
    """Of `loss`, nats: the sample standard deviation of the sequences' mean losses over the square
    root of their number; None for one sequence. Sequences cut from one document are alike, so it is
    rather too small. It says how far another slice would differ; between two models on the same
    slice most of that falls away."""
    loss_by_position: tuple[float, ...] = ()
    """Mean loss in each sixteenth of the context, the beginning first."""
    sequence_losses: tuple[float, ...] = ()
    """Mean loss of each sequence, in order."""
    slice_fingerprint: str = ""
    """Of the predicted tokens in their order, 16 hexadecimal digits: equal for two results that are
    about the same tokens, whatever the context that each was given."""


def heldout_loss(
    model: GPT, config: RunConfig, dataset: DatasetManifest, tokens: int | None = None
) -> HeldoutLoss:
    """The value of `evaluate_heldout`, with no progress told."""
    return run_to_completion(evaluate_heldout(model, config, dataset, tokens))


@torch.no_grad()
def evaluate_heldout(
    model: GPT, config: RunConfig, dataset: DatasetManifest, tokens: int | None = None
) -> ProgressGenerator[HeldoutLoss]:
    """Loss over the first `tokens` validation tokens (left out: `evaluation.tokens`), each seen
    once with the context of its own sequence. Leaves the model in the mode it was in.

    Where the device runs out of memory, goes on with half as many sequences at once, down to one:
    the result is the same. Raises `OutOfMemoryError` when one is too many.
    """
    tokens = config.evaluation.tokens if tokens is None else tokens
    dtype = config.training.dtype
    was_training = model.training
    model.eval()
    sequences = SequenceDataset(dataset, dataset.validation, model.config.block_size)
    batch_size = config.evaluation.batch_size
    try:
        while True:
            batches = iterate_validation_batches(sequences, tokens, batch_size)
            try:
                return (yield from _loss_over(model, dtype, dataset, batches, tokens))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            batch_size = halve_batch_size(batch_size)
    finally:
        model.train(was_training)


def _loss_over(
    model: GPT, dtype: str, dataset: DatasetManifest, batches: Iterable[Batch], tokens: int
) -> ProgressGenerator[HeldoutLoss]:
    device, block_size = model.head.device, model.config.block_size
    by_sequence = []
    by_position = torch.zeros(block_size, dtype=torch.float64, device=device)
    text_bytes = done = 0
    digest = hashlib.sha256(dataset.ranks_sha256.encode())
    for inputs, targets in batches:
        with autocast(device, dtype):
            hidden = model(inputs.to(device))
            losses = token_losses(hidden, model.head, targets.to(device), model.logit_softcap)
        by_sequence.append(losses.sum(dim=1, dtype=torch.float64))
        by_position += losses.sum(dim=0, dtype=torch.float64)
        text_bytes += int(_bytes_per_token()[targets.numpy()].sum())
        digest.update(targets.numpy().astype("<u2").tobytes())
        done += targets.numel()
        yield EvaluationProgress("validation loss", done, tokens)
    sums = torch.cat(by_sequence).cpu().numpy()
    summed = float(sums.sum())
    mean = summed / done
    return HeldoutLoss(
        tokens=done,
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=summed / math.log(2) / max(1, text_bytes),
        standard_error=_standard_error(sums / block_size),
        loss_by_position=_in_buckets(by_position.cpu().numpy() / len(sums)),
        sequence_losses=tuple((sums / block_size).tolist()),
        slice_fingerprint=digest.hexdigest()[:16],
    )


def _standard_error(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _in_buckets(by_position: NDArray[np.float64]) -> tuple[float, ...]:
    """Means of `POSITION_BUCKETS` equal parts, as far as the positions divide; fewer for fewer."""
    parts = np.array_split(by_position, min(POSITION_BUCKETS, len(by_position)))
    return tuple(float(part.mean()) for part in parts)


@cache
def _bytes_per_token() -> np.ndarray:
    tokenizer = load_tokenizer()
    lengths = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for token in range(tokenizer.n_vocab):
        if token != tokenizer.eot_token:
            lengths[token] = len(tokenizer.decode_single_token_bytes(token))
    return lengths
