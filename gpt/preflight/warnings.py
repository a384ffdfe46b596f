"""Warnings: settings that work but cost something, or that the user probably did not intend."""

import os
import socket
from collections.abc import Iterator
from functools import cache
from urllib.parse import urlsplit

from gpt.errors import Problem
from gpt.preflight.checks import describe_need, gib, missing_data
from gpt.preflight.figures import Figures
from gpt.schedule import REFERENCE_TOKENS_PER_STEP, peak_learning_rates

TRACKING_SECONDS = 0.3
"""Time limit for a connection to the tracking server."""
USEFUL_EPOCHS = 4
"""After this many epochs text teaches much less (Muennighoff et al. 2023, arXiv:2305.16264)."""
TOKENS_PER_STEP_FACTOR = 4
"""Range of tokens per step, around the reference, for which the default learning rate is good."""


def find_warnings(figures: Figures) -> Iterator[Problem]:
    """Yield everything that works but should be known before the run."""
    yield from warn_about_gpu(figures)
    yield from warn_about_model(figures)
    yield from warn_about_optimizer(figures)
    yield from warn_about_data(figures)
    yield from warn_about_tracking(figures)


def warn_about_gpu(figures: Figures) -> Iterator[Problem]:
    config, gpu, needed = figures.config, figures.gpu, figures.memory.needed_bytes
    if gpu.warning:
        yield gpu.warning
    total, free = gpu.memory_bytes, gpu.free_bytes
    if total is not None and free is not None and free < needed <= total:
        rule = (
            f"has too little free memory: the run needs {gib(needed)}; other processes leave "
            f"{gib(free)} of {gpu.name}"
        )
        remedy = "stop what else uses the GPU, e.g. a desktop or another training"
        yield Problem("hardware.device", config.hardware.device, rule, remedy)
    if figures.is_reduced_at_start:
        value = str(config.training.batch_size)
        rule = f"{describe_need(figures)}. It is halved and grad_acc doubled until the run fits"
        remedy = "nothing to do; the suggestions fit at once"
        yield Problem("training.batch_size", value, rule, remedy)
    if gpu.spec and not gpu.spec.has_bfloat16 and config.training.dtype == "bfloat16":
        rule = f"is not supported by {gpu.spec.name}: float16 with gradient scaling is used"
        yield Problem("training.dtype", "bfloat16", rule, "nothing to do")


def warn_about_model(figures: Figures) -> Iterator[Problem]:
    model = figures.config.model
    head_size = model.n_embd // model.n_head
    if head_size % 8:
        rule = (
            f"makes heads of {model.n_embd} / {model.n_head} = {head_size} channels: attention "
            f"kernels pad them to {-(-head_size // 8) * 8}, which costs memory and time"
        )
        remedy = "use a suggestion with a multiple of 8, or keep it: it works"
        yield Problem("model.n_head", str(model.n_head), rule, remedy)
    if model.vocab_size % 64:
        rule = "is not a multiple of 64, so the head cannot use the fast matmul kernels"
        padded = min(-(-model.vocab_size // 64) * 64, 65_536)
        remedy = f"set model.vocab_size to {padded}; the extra rows cost little"
        yield Problem("model.vocab_size", str(model.vocab_size), rule, remedy)
    if model.bias and model.architecture == "nanochat":
        yield Problem("model.bias", "true", "has no effect: nanochat has no biases", "remove it")


def warn_about_optimizer(figures: Figures) -> Iterator[Problem]:
    config, tokens = figures.config, figures.config.tokens_per_step
    optimizer, rates = config.optimizer, peak_learning_rates(config)
    low = REFERENCE_TOKENS_PER_STEP // TOKENS_PER_STEP_FACTOR
    high = REFERENCE_TOKENS_PER_STEP * TOKENS_PER_STEP_FACTOR
    if optimizer.learning_rate is None and not low <= tokens <= high:
        micro_batch = config.training.batch_size * config.model.block_size
        grad_acc = max(1, round(REFERENCE_TOKENS_PER_STEP / micro_batch))
        rule = (
            f"makes {tokens:,} tokens per step; the default learning rate, {rates.matrices:.2g}, "
            f"was tuned at about {REFERENCE_TOKENS_PER_STEP:,}"
        )
        remedy = f"set training.grad_acc to {grad_acc}, or set optimizer.learning_rate"
        yield Problem("training.grad_acc", str(config.training.grad_acc), rule, remedy)
    if optimizer.name == "adamw":
        for name in ("embedding_learning_rate", "head_learning_rate"):
            if (rate := getattr(optimizer, name)) is not None:
                rule = "has no effect: adamw has one learning rate"
                remedy = 'remove it, or set optimizer.name to "muon"'
                yield Problem(f"optimizer.{name}", f"{rate:g}", rule, remedy)
    elif not rates.head <= rates.matrices <= rates.embedding:
        rule = (
            f"is out of order: with muon the embedding's ({rates.embedding:.2g}) should be the "
            f"highest and the head's ({rates.head:.2g}) the lowest"
        )
        remedy = "remove all three to use the defaults"
        yield Problem("optimizer.learning_rate", f"{rates.matrices:g}", rule, remedy)


def warn_about_data(figures: Figures) -> Iterator[Problem]:
    config, data = figures.config, figures.data
    if not figures.starting:
        yield from missing_data(figures)
    about = "" if data.exact else "about "
    tokens, wanted = data.train_tokens, config.total_tokens
    if tokens and wanted > USEFUL_EPOCHS * tokens:
        epochs = f"{about}{wanted / tokens:,.1f} epochs"
        rule = f"makes {wanted:,} tokens of {about}{tokens:,}: {epochs}"
        steps = max(1, USEFUL_EPOCHS * tokens // config.tokens_per_step)
        remedy = (
            f"use more text, or at most {steps:,} steps: after {USEFUL_EPOCHS} epochs text teaches "
            "little"
        )
        yield Problem("training.max_steps", str(config.training.max_steps), rule, remedy)
    tokens, wanted = data.validation_tokens, config.evaluation.tokens
    if tokens is not None and tokens < wanted:
        rule = f"exceeds the validation split of {about}{tokens:,} tokens; those are evaluated"
        remedy = (
            f"set evaluation.tokens to {max(1, tokens)}, or use a larger data.validation_fraction"
        )
        yield Problem("evaluation.tokens", str(wanted), rule, remedy)


def warn_about_tracking(figures: Figures) -> Iterator[Problem]:
    uri = figures.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith(("http://", "https://")) and not _accepts_connections(uri):
        rule = "is unreachable; metrics stay on disk and are uploaded once the server answers"
        remedy = "start the server, or remove the address to track on this machine"
        yield Problem("tracking.uri", uri, rule, remedy)


@cache
def _accepts_connections(uri: str) -> bool:
    try:
        address = urlsplit(uri)
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), TRACKING_SECONDS).close()
    except (OSError, ValueError, UnicodeError):
        return False
    return True
