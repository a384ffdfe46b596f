"""Loss on text that was kept out of training: one fixed slice, the same for every config."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from gpt.artifacts import DatasetManifest
from gpt.config import RunConfig
from gpt.data.batches import Batch, Sequences, validation_batches
from gpt.data.tokenizer import VOCABULARY, load_tokenizer
from gpt.errors import OutOfMemoryError, Problem
from gpt.model.device import autocast, is_out_of_memory
from gpt.model.loss import token_losses
from gpt.model.transformer import GPT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldoutLoss:
    """`loss` is the mean over `tokens` predicted tokens, nats; `bits_per_byte` is over the UTF-8
    bytes that those tokens stand for (end-of-text stands for none), so that models with
    different tokenizers compare."""

    tokens: int
    loss: float
    perplexity: float
    bits_per_byte: float


@torch.no_grad()
def heldout_loss(model: GPT, config: RunConfig, dataset: DatasetManifest) -> HeldoutLoss:
    """Loss over the first `evaluation.tokens` validation tokens, each seen once with the context
    of its own sequence. Leaves the model in the mode it was in.

    Where the device runs out of memory, goes on with half as many sequences at once, down to one:
    the result is the same. Raises `OutOfMemoryError` when one is too many.
    """
    was_training = model.training
    model.eval()
    sequences = Sequences(dataset, dataset.validation, config.model.block_size)
    batch_size = config.evaluation.batch_size
    try:
        while True:
            batches = validation_batches(sequences, config.evaluation.tokens, batch_size)
            try:
                return _loss_over(model, config, batches)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                batch_size = _smaller(batch_size)
    finally:
        model.train(was_training)


def _loss_over(model: GPT, config: RunConfig, batches: Iterable[Batch]) -> HeldoutLoss:
    device = model.head.device
    total, tokens, text_bytes = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    for inputs, targets in batches:
        with autocast(device, config.training.dtype):
            hidden = model(inputs.to(device))
            losses = token_losses(hidden, model.head, targets.to(device), model.logit_softcap)
        total += losses.sum(dtype=torch.float64)
        tokens += targets.numel()
        text_bytes += int(_bytes_per_token()[targets.numpy()].sum())
    summed = float(total)
    mean = summed / tokens
    return HeldoutLoss(
        tokens=tokens,
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=summed / math.log(2) / max(1, text_bytes),
    )


def _smaller(batch_size: int) -> int:
    if batch_size == 1:
        raise OutOfMemoryError(
            Problem(
                "evaluation.batch_size",
                "1",
                "the device runs out of memory while evaluating one sequence",
                "close what else uses the device, or train a smaller model",
            )
        )
    logger.warning("out of memory in evaluation: going on with batch %d", batch_size // 2)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return batch_size // 2


@cache
def _bytes_per_token() -> np.ndarray:
    tokenizer = load_tokenizer()
    lengths = np.zeros(VOCABULARY, dtype=np.int64)
    for token in range(tokenizer.n_vocab):
        if token != tokenizer.eot_token:
            lengths[token] = len(tokenizer.decode_single_token_bytes(token))
    return lengths
