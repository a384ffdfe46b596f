"""Warnings: settings that work but cost something, or that the user probably did not intend."""

from __future__ import annotations

import os
import socket
from functools import cache
from urllib.parse import urlsplit

from gpt.errors import Problem
from gpt.preflight.checks import Check, CheckContext, gib, missing_data
from gpt.preflight.time import total_tokens
from gpt.schedule import REFERENCE_TOKENS_PER_STEP, peak_learning_rates

TRACKING_SECONDS = 0.3
"""Time limit for a connection to the tracking server."""
USEFUL_EPOCHS = 4
"""After this many epochs text teaches much less (Muennighoff et al. 2023, arXiv:2305.16264)."""
TOKENS_PER_STEP_FACTOR = 4
"""Range of tokens per step, around the reference, for which the default learning rate is good."""


def warn_unknown_gpu(context: CheckContext) -> Problem | None:
    return context.gpu.warning


def warn_memory_in_use(context: CheckContext) -> Problem | None:
    gpu, needed = context.gpu, context.memory.needed_bytes
    if gpu.memory_bytes is None or gpu.free_bytes is None:
        return None
    if not gpu.free_bytes < needed <= gpu.memory_bytes:
        return None
    return Problem(
        "hardware.device",
        context.config.hardware.device,
        f"has too little free memory: the run needs {gib(needed)}; other processes leave "
        f"{gib(gpu.free_bytes)} of {gpu.name}",
        "stop what else uses the GPU, e.g. a desktop or another training",
    )


def warn_reduced_batch(context: CheckContext) -> Problem | None:
    if not context.is_reduced_at_start:
        return None
    return Problem(
        "training.batch_size",
        str(context.config.training.batch_size),
        f"{context.memory_rule}. It is halved and grad_acc doubled until the run fits",
        "nothing to do; the suggestions fit at once",
    )


def warn_no_bfloat16(context: CheckContext) -> Problem | None:
    spec, dtype = context.gpu.spec, context.config.training.dtype
    if spec is None or dtype != "bfloat16" or spec.bf16_tflops is not None:
        return None
    rule = f"is not supported by {spec.name}: float16 with gradient scaling is used"
    return Problem("training.dtype", dtype, rule, "nothing to do")


def warn_unaligned_heads(context: CheckContext) -> Problem | None:
    model = context.config.model
    size = model.n_embd // model.n_head
    if size % 8 == 0:
        return None
    return Problem(
        "model.n_head",
        str(model.n_head),
        f"gives heads of {model.n_embd} / {model.n_head} = {size} channels: attention kernels pad "
        f"them to {-(-size // 8) * 8}, which costs memory and time",
        "use a suggestion with a multiple of 8, or keep it: it works",
    )


def warn_unaligned_vocabulary(context: CheckContext) -> Problem | None:
    size = context.config.model.vocab_size
    if size % 64 == 0:
        return None
    return Problem(
        "model.vocab_size",
        str(size),
        "is not a multiple of 64, so the head cannot use the fast matmul kernels",
        f"set model.vocab_size to {min(-(-size // 64) * 64, 65_536)}; the extra rows cost little",
    )


def warn_step_size(context: CheckContext) -> Problem | None:
    config, tokens = context.config, context.config.tokens_per_step
    low = REFERENCE_TOKENS_PER_STEP // TOKENS_PER_STEP_FACTOR
    high = REFERENCE_TOKENS_PER_STEP * TOKENS_PER_STEP_FACTOR
    if config.optimizer.learning_rate is not None or low <= tokens <= high:
        return None
    micro_batch = config.training.batch_size * config.model.block_size
    grad_acc = max(1, round(REFERENCE_TOKENS_PER_STEP / micro_batch))
    rate = peak_learning_rates(config).matrices
    return Problem(
        "training.grad_acc",
        str(config.training.grad_acc),
        f"makes {tokens:,} tokens per step; the default learning rate, {rate:.2g}, was tuned at "
        f"about {REFERENCE_TOKENS_PER_STEP:,}",
        f"set training.grad_acc to {grad_acc}, or set optimizer.learning_rate",
    )


def warn_learning_rates(context: CheckContext) -> Problem | None:
    optimizer, rates = context.config.optimizer, peak_learning_rates(context.config)
    if optimizer.name == "adamw":
        for name in ("embedding_learning_rate", "head_learning_rate"):
            if (rate := getattr(optimizer, name)) is not None:
                rule = "has no effect: adamw has one learning rate"
                remedy = 'remove it, or set optimizer.name to "muon"'
                return Problem(f"optimizer.{name}", f"{rate:g}", rule, remedy)
        return None
    if rates.head <= rates.matrices <= rates.embedding:
        return None
    return Problem(
        "optimizer.learning_rate",
        f"{rates.matrices:g}",
        f"is out of order: with muon the embedding's ({rates.embedding:.2g}) should be the highest "
        f"and the head's ({rates.head:.2g}) the lowest",
        "remove all three to use the defaults",
    )


def warn_unused_bias(context: CheckContext) -> Problem | None:
    model = context.config.model
    if model.architecture == "gpt2" or not model.bias:
        return None
    return Problem("model.bias", "true", "has no effect: nanochat has no biases", "remove it")


def warn_missing_data(context: CheckContext) -> Problem | None:
    return None if context.starting else missing_data(context)


def warn_many_epochs(context: CheckContext) -> Problem | None:
    config, tokens, about = context.config, context.data.train_tokens, _about(context)
    wanted = total_tokens(config)
    if not tokens or wanted <= USEFUL_EPOCHS * tokens:
        return None
    steps = max(1, USEFUL_EPOCHS * tokens // config.tokens_per_step)
    return Problem(
        "training.max_steps",
        str(config.training.max_steps),
        f"makes {wanted:,} tokens of {about}{tokens:,}: {about}{wanted / tokens:,.1f} epochs",
        f"use more text, or at most {steps:,} steps: after {USEFUL_EPOCHS} epochs text teaches "
        "little",
    )


def warn_short_validation_split(context: CheckContext) -> Problem | None:
    tokens, wanted = context.data.validation_tokens, context.config.evaluation.tokens
    if tokens is None or tokens >= wanted:
        return None
    return Problem(
        "evaluation.tokens",
        str(wanted),
        f"exceeds the validation split of {_about(context)}{tokens:,} tokens; those are evaluated",
        f"set evaluation.tokens to {max(1, tokens)}, or use a larger data.validation_fraction",
    )


def warn_unreachable_tracking(context: CheckContext) -> Problem | None:
    uri = context.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith(("http://", "https://")) or _accepts_connections(uri):
        return None
    return Problem(
        "tracking.uri",
        uri,
        "is unreachable; the run is recorded on disk and uploaded once the MLflow server answers",
        "start the server, or remove the address to track on this machine",
    )


WARNINGS: tuple[Check, ...] = (
    warn_unknown_gpu,
    warn_memory_in_use,
    warn_reduced_batch,
    warn_no_bfloat16,
    warn_unaligned_heads,
    warn_unaligned_vocabulary,
    warn_step_size,
    warn_learning_rates,
    warn_unused_bias,
    warn_missing_data,
    warn_many_epochs,
    warn_short_validation_split,
    warn_unreachable_tracking,
)


def _about(context: CheckContext) -> str:
    return "" if context.data.exact else "about "


@cache
def _accepts_connections(uri: str) -> bool:
    try:
        address = urlsplit(uri)
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), TRACKING_SECONDS).close()
    except (OSError, ValueError, UnicodeError):
        return False
    return True
