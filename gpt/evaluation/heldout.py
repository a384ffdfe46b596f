"""Loss on text that was kept out of training: one fixed slice, the same for every config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from gpt.artifacts import DatasetManifest
from gpt.config import RunConfig
from gpt.data.batches import Sequences, validation_batches
from gpt.data.tokenizer import VOCABULARY, load_tokenizer
from gpt.model.device import autocast
from gpt.model.loss import token_losses
from gpt.model.transformer import GPT


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
    of its own sequence. Leaves the model in the mode it was in."""
    device = model.head.device
    sequences = Sequences(dataset, dataset.validation, config.model.block_size)
    evaluation = config.evaluation
    was_training = model.training
    model.eval()
    total, tokens, text_bytes = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    for inputs, targets in validation_batches(sequences, evaluation.tokens, evaluation.batch_size):
        with autocast(device, config.training.dtype):
            hidden = model(inputs.to(device))
            losses = token_losses(hidden, model.head, targets.to(device), model.logit_softcap)
        total += losses.sum(dtype=torch.float64)
        tokens += targets.numel()
        text_bytes += int(_bytes_per_token()[targets.numpy()].sum())
    model.train(was_training)
    summed = float(total)
    mean = summed / tokens
    return HeldoutLoss(
        tokens=tokens,
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=summed / math.log(2) / max(1, text_bytes),
    )


@cache
def _bytes_per_token() -> np.ndarray:
    tokenizer = load_tokenizer()
    lengths = np.zeros(VOCABULARY, dtype=np.int64)
    for token in range(tokenizer.n_vocab):
        if token != tokenizer.eot_token:
            lengths[token] = len(tokenizer.decode_single_token_bytes(token))
    return lengths
