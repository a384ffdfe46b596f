"""Rules that need more than the values: the card, the data, the disk, the network. And warnings:
what works but costs something.

Each is a function of the `CheckContext` that gives a `Problem` or None; `PROBLEMS` stop a run,
`WARNINGS` do not.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from gpt.config.schema import RunConfig
from gpt.errors import Problem
from gpt.hardware.gpus import GIB
from gpt.preflight.data_estimate import DataEstimate
from gpt.preflight.layout import devices_of
from gpt.preflight.memory import Memory
from gpt.preflight.named_files import check_benchmark_files, check_init_from
from gpt.preflight.sharding import misfit
from gpt.preflight.target import TargetGPU
from gpt.preflight.time import disk_bytes, total_tokens
from gpt.schedule import REFERENCE_TOKENS_PER_STEP, peak_learning_rates

TRACKING_SECONDS = 0.3
"""Longest wait for a tracking server to answer."""
REPEATS_WORTH_IT = 4
"""Epochs after which text teaches much less (Muennighoff et al. 2023, arXiv:2305.16264)."""
TOKENS_PER_STEP_FACTOR = 4
"""How far tokens a step may be from what the learning rate by rule was found with."""


@dataclass(frozen=True)
class CheckContext:
    """All that the checks look at."""

    config: RunConfig
    target: TargetGPU
    data: DataEstimate
    memory: Memory
    starting: bool
    """Whether a run starts now, on this machine, and not a person asks beforehand."""
    smaller: tuple[str, ...] = ()
    """Settings with which a run that does not fit would, each as overrides."""


Check = Callable[[CheckContext], Problem | None]


def gb(count: float) -> str:
    """As disks are sold."""
    return f"{count / 1e9:.1f} GB"


def gib(count: float) -> str:
    """As cards are sold: one of 12 GB has 12 x 2^30 bytes."""
    return f"{count / GIB:.1f} GiB"


# --- what stops a run ----------------------------------------------------------------------------


def device_exists(facts: CheckContext) -> Problem | None:
    wanted, target = facts.config.hardware.device, facts.target
    if not wanted.startswith("cuda") or target.named:
        return None
    index = int(wanted.partition(":")[2] or 0)
    if index < target.found:
        return None
    return Problem(
        "hardware.device",
        wanted,
        f"this machine shows {target.found} NVIDIA GPUs",
        'use "auto" or "cpu", mend the driver, or name a card with --gpu to ask about another '
        "machine",
    )


def devices_are_here(facts: CheckContext) -> Problem | None:
    hardware, target = facts.config.hardware, facts.target
    asked_about = target.named or not facts.starting or hardware.device == "cpu"
    if asked_about or not 0 < target.found < hardware.devices:
        return None
    return Problem(
        "hardware.devices",
        str(hardware.devices),
        f"this machine shows {target.found} NVIDIA GPUs",
        f"set hardware.devices to {target.found}, or start on a machine that has more",
    )


def fits_the_card(facts: CheckContext) -> Problem | None:
    target, memory = facts.target, facts.memory
    if target.memory_bytes is None or facts.config.hardware.device == "cpu":
        return None
    if devices_of(facts.config) > 1:
        return misfit(facts.config, target.memory_bytes)
    # A run that starts makes its own micro-batches smaller, if that can help.
    if memory.needed_bytes <= target.memory_bytes or (facts.starting and facts.smaller):
        return None
    remedy = "take a smaller model, or a larger card"
    if facts.smaller:
        remedy = f"set {', or '.join(facts.smaller)}"
    return Problem(
        "training.batch_size",
        str(facts.config.training.batch_size),
        f"needs {gib(memory.needed_bytes)}, and {target.name} has {gib(target.memory_bytes)}",
        remedy,
    )


def data_is_there(facts: CheckContext) -> Problem | None:
    if not facts.data.missing or not facts.starting:
        return None
    return _missing(facts)


def data_fills_a_batch(facts: CheckContext) -> Problem | None:
    tokens, training = facts.data.most_train_tokens, facts.config.training
    block = facts.config.model.block_size
    if tokens is None or tokens > training.batch_size * block:
        return None
    remedy = f"give more text, or a batch of at most {max(1, (tokens - 1) // block)} sequences"
    if tokens <= block:
        remedy = f"give more text, or a model.block_size under {tokens}"
    return Problem(
        "model.block_size" if tokens <= block else "training.batch_size",
        str(block if tokens <= block else training.batch_size),
        f"one batch is {training.batch_size} x {block:,} tokens, and there are at most {tokens:,} "
        "to train on",
        remedy,
    )


def begins_with_this_model(facts: CheckContext) -> Problem | None:
    return check_init_from(facts.config)


def benchmarks_are_there(facts: CheckContext) -> Problem | None:
    return check_benchmark_files(facts.config) if facts.starting else None


def output_is_writable(facts: CheckContext) -> Problem | None:
    root = facts.config.run.root
    try:
        ancestor = _existing_ancestor(root)
        fault = None
        if not ancestor.is_dir():
            fault = f"{ancestor} is a file, not a folder"
        elif not os.access(ancestor, os.W_OK | os.X_OK):
            fault = f"{ancestor} cannot be written to"
    except (OSError, ValueError) as error:
        fault = f"no such folder can be: {error}"
    if fault is None:
        return None
    return Problem("run.root", str(root), fault, "name a folder that can be written to")


def disk_suffices(facts: CheckContext) -> Problem | None:
    needed, free = disk_needed(facts), free_disk_bytes(facts.config)
    if free is None or sum(needed.values()) <= free:
        return None
    parts = ", ".join(f"{name} {gb(size)}" for name, size in needed.items())
    return Problem(
        "run.root",
        str(facts.config.run.root),
        f"has {gb(free)} free, and the run writes {gb(sum(needed.values()))}: {parts}",
        "free some, keep fewer checkpoints (training.checkpoints_kept), or name another folder",
    )


# --- what does not -------------------------------------------------------------------------------


def card_is_known(facts: CheckContext) -> Problem | None:
    return facts.target.warning


def data_is_missing(facts: CheckContext) -> Problem | None:
    if not facts.data.missing or facts.starting:
        return None
    return _missing(facts)


def card_is_free(facts: CheckContext) -> Problem | None:
    target, needed = facts.target, facts.memory.needed_bytes
    total, free = target.memory_bytes, target.free_bytes
    if total is None or free is None or not free < needed <= total:
        return None
    return Problem(
        "hardware.device",
        facts.config.hardware.device,
        f"the run needs {gib(needed)}, and others hold all but {gib(free)} of {target.name}",
        "end what else runs on the card, as a desktop's windows or another training",
    )


def card_is_made_to_fit(facts: CheckContext) -> Problem | None:
    target, needed = facts.target, facts.memory.needed_bytes
    if not (facts.starting and facts.smaller) or facts.config.hardware.device == "cpu":
        return None
    if target.memory_bytes is None or needed <= target.memory_bytes:
        return None
    if devices_of(facts.config) > 1:
        return None
    return Problem(
        "training.batch_size",
        str(facts.config.training.batch_size),
        f"needs {gib(needed)}, and {target.name} has {gib(target.memory_bytes)}: it will be halved "
        "and grad_acc doubled until the run fits",
        "nothing has to be done; the suggestions say what would fit at once",
    )


def heads_are_aligned(facts: CheckContext) -> Problem | None:
    model = facts.config.model
    size = model.n_embd // model.n_head
    if size % 8 == 0:
        return None
    return Problem(
        "model.n_head",
        str(model.n_head),
        f"heads of {model.n_embd} / {model.n_head} = {size} channels: attention kernels pad them "
        f"to {-(-size // 8) * 8}, at the cost of memory and time",
        "take a suggestion with a multiple of 8, or leave it: it works",
    )


def vocabulary_is_aligned(facts: CheckContext) -> Problem | None:
    size = facts.config.model.vocab_size
    if size % 64 == 0:
        return None
    return Problem(
        "model.vocab_size",
        str(size),
        "is no multiple of 64, so the head's products miss the fast kernels",
        f"set model.vocab_size to {min(-(-size // 64) * 64, 65_536)}; the rows on top cost little",
    )


def dtype_is_the_cards(facts: CheckContext) -> Problem | None:
    card, dtype = facts.target.card, facts.config.training.dtype
    if card is None or dtype != "bfloat16" or card.bf16_tflops is not None:
        return None
    return Problem(
        "training.dtype",
        dtype,
        f"{card.name} has no bfloat16, so the run takes float16 and scales its gradients",
        "nothing has to be done",
    )


def learning_rate_suits_the_step(facts: CheckContext) -> Problem | None:
    config, tokens = facts.config, facts.config.tokens_per_step
    low = REFERENCE_TOKENS_PER_STEP // TOKENS_PER_STEP_FACTOR
    high = REFERENCE_TOKENS_PER_STEP * TOKENS_PER_STEP_FACTOR
    if config.optimizer.learning_rate is not None or low <= tokens <= high:
        return None
    one = config.training.batch_size * config.model.block_size
    grad_acc = max(1, round(REFERENCE_TOKENS_PER_STEP / one))
    rate = peak_learning_rates(config).matrices
    return Problem(
        "training.grad_acc",
        str(config.training.grad_acc),
        f"makes {tokens:,} tokens a step, and the learning rate by rule, {rate:.2g}, was found at "
        f"about {REFERENCE_TOKENS_PER_STEP:,}",
        f"set training.grad_acc to {grad_acc}, or give optimizer.learning_rate",
    )


def learning_rates_are_in_order(facts: CheckContext) -> Problem | None:
    optimizer, rates = facts.config.optimizer, peak_learning_rates(facts.config)
    if optimizer.name == "adamw":
        given = [
            name
            for name in ("embedding_learning_rate", "head_learning_rate")
            if getattr(optimizer, name) is not None
        ]
        if not given:
            return None
        return Problem(
            f"optimizer.{given[0]}",
            f"{getattr(optimizer, given[0]):g}",
            "adamw has one learning rate, so this does nothing",
            'leave it out, or set optimizer.name to "muon"',
        )
    if rates.head <= rates.matrices <= rates.embedding:
        return None
    return Problem(
        "optimizer.learning_rate",
        f"{rates.matrices:g}",
        f"with muon the embedding's ({rates.embedding:.2g}) is the highest, the head's "
        f"({rates.head:.2g}) the lowest: these are out of order",
        "leave all three out to have them by rule",
    )


def biases_are_used(facts: CheckContext) -> Problem | None:
    model = facts.config.model
    if model.architecture == "gpt2" or not model.bias:
        return None
    return Problem("model.bias", "true", "nanochat has no biases, so this does nothing", "leave it")


def data_lasts(facts: CheckContext) -> Problem | None:
    tokens, asked = facts.data.train_tokens, total_tokens(facts.config)
    if not tokens or asked <= REPEATS_WORTH_IT * tokens:
        return None
    about = "" if facts.data.exact else "about "
    steps = max(1, REPEATS_WORTH_IT * tokens // facts.config.tokens_per_step)
    return Problem(
        "training.max_steps",
        str(facts.config.training.max_steps),
        f"asks for {asked:,} tokens of {about}{tokens:,}: {about}{asked / tokens:,.1f} times each",
        f"give more text, or at most {steps:,} steps: after {REPEATS_WORTH_IT} times text teaches "
        "little",
    )


def step_is_no_epoch(facts: CheckContext) -> Problem | None:
    tokens, step = facts.data.train_tokens, facts.config.tokens_per_step
    if not tokens or tokens >= step:
        return None
    about = "" if facts.data.exact else "about "
    return Problem(
        "training.grad_acc",
        str(facts.config.training.grad_acc),
        f"one step takes {step:,} tokens and there are {about}{tokens:,}: it would see some twice",
        "give more text, or a smaller grad_acc",
    )


def validation_fills_the_slice(facts: CheckContext) -> Problem | None:
    tokens, wanted = facts.data.validation_tokens, facts.config.evaluation.tokens
    if tokens is None or tokens >= wanted:
        return None
    about = "" if facts.data.exact else "about "
    return Problem(
        "evaluation.tokens",
        str(wanted),
        f"the validation side has {about}{tokens:,} tokens, so the loss is of those alone",
        f"set evaluation.tokens to {max(1, tokens)}, or a larger data.validation_fraction",
    )


def tracking_answers(facts: CheckContext) -> Problem | None:
    uri = facts.config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith(("http://", "https://")) or _answers(uri):
        return None
    return Problem(
        "tracking.uri",
        uri,
        "no MLflow server answers there; a run goes on and tells it all when one does",
        "start the server, or leave the address out to track on this machine",
    )


PROBLEMS: tuple[Check, ...] = (
    device_exists,
    devices_are_here,
    fits_the_card,
    data_is_there,
    data_fills_a_batch,
    begins_with_this_model,
    benchmarks_are_there,
    output_is_writable,
    disk_suffices,
)
WARNINGS: tuple[Check, ...] = (
    card_is_known,
    card_is_free,
    card_is_made_to_fit,
    dtype_is_the_cards,
    heads_are_aligned,
    vocabulary_is_aligned,
    learning_rate_suits_the_step,
    learning_rates_are_in_order,
    biases_are_used,
    data_is_missing,
    step_is_no_epoch,
    data_lasts,
    validation_fills_the_slice,
    tracking_answers,
)


# --- what they share -----------------------------------------------------------------------------


def disk_needed(facts: CheckContext) -> dict[str, int]:
    """Bytes by part; shards that are there already cost nothing again."""
    data = facts.data
    tokens = 0 if data.exact else (data.train_tokens or 0) + (data.validation_tokens or 0)
    return disk_bytes(facts.config, tokens)


def free_disk_bytes(config: RunConfig) -> int | None:
    """Where the run would write; None where that cannot be told."""
    try:
        return shutil.disk_usage(_existing_ancestor(config.run.root)).free
    except (OSError, ValueError):
        return None


def _existing_ancestor(path: Path) -> Path:
    absolute = path.expanduser().absolute()
    return next(p for p in (absolute, *absolute.parents) if p.exists())


def _missing(facts: CheckContext) -> Problem:
    sources = ", ".join(facts.data.missing)
    rule = "there is no such file, or nothing matches"
    remedy = f"put Parquet there, or name another; paths start from {Path.cwd()}"
    return Problem("data.source", sources, rule, remedy)


@cache
def _answers(uri: str) -> bool:
    try:
        address = urlsplit(uri)
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), TRACKING_SECONDS).close()
    except (OSError, ValueError, UnicodeError):
        return False
    return True
