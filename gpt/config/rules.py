"""Rules between values of a config: combinations that cannot work.

A rule runs only if all its values are valid by themselves, so one wrong value is reported once.
Combinations that work but cost something are warnings (`gpt.preflight.warnings`).
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from gpt.errors import Problem

Check = Callable[..., Problem | None]
RULES: list[tuple[tuple[str, ...], Check]] = []

MAX_WIDTH = 65_536
"""Largest n_embd and n_head."""
HEAD_SPLIT_REMEDY = "use one of: "


def rule(*keys: str) -> Callable[[Check], Check]:
    """Register a check of the values of `keys`."""

    def register(check: Check) -> Check:
        RULES.append((keys, check))
        return check

    return register


def check_rules(values: Mapping[str, Any]) -> list[Problem]:
    """Return every broken rule whose values, by dotted key, are all given."""
    checks = [(keys, check) for keys, check in RULES if values.keys() >= set(keys)]
    found = (check(*(values[key] for key in keys)) for keys, check in checks)
    return [problem for problem in found if problem]


@rule("model.n_embd", "model.n_head", "model.architecture")
def check_head_split(n_embd: int, n_head: int, architecture: str) -> Problem | None:
    size, is_nanochat = n_embd // n_head, architecture == "nanochat"
    if n_embd % n_head:
        key, value = "model.n_embd", n_embd
        quotient = f"{n_embd} / {n_head} = {n_embd / n_head:.2f}"
        rule = f"is not divisible by model.n_head = {n_head} ({quotient})"
    elif is_nanochat and size % 2:
        key, value = "model.n_head", n_head
        rule = (
            f"makes heads of {n_embd} / {n_head} = {size} channels; rotary positions rotate "
            "channels in pairs, so nanochat needs an even number"
        )
    else:
        return None
    splits = valid_head_splits(n_embd, n_head, even=is_nanochat)
    choices = ", ".join(f"{width}/{heads}" for width, heads in splits)
    return Problem(key, str(value), rule, f"{HEAD_SPLIT_REMEDY}{choices}")


@rule("schedule.warmup_steps", "training.max_steps")
def check_warmup(warmup_steps: int, max_steps: int) -> Problem | None:
    if warmup_steps < max_steps:
        return None
    rule = f"is not below training.max_steps = {max_steps}, so the learning rate never peaks"
    remedy = f"set schedule.warmup_steps to at most {max(0, max_steps // 10)}"
    return Problem("schedule.warmup_steps", str(warmup_steps), rule, remedy)


@rule("data.min_length", "data.max_length")
def check_document_lengths(min_length: int, max_length: int | None) -> Problem | None:
    if max_length is None or min_length <= max_length:
        return None
    rule = f"exceeds data.max_length = {max_length}, so no document passes"
    remedy = f"set data.min_length to at most {max_length}, or raise data.max_length"
    return Problem("data.min_length", str(min_length), rule, remedy)


@rule("data.store")
def check_store_protocol(store: str) -> Problem | None:
    protocol, address, _ = store.partition("://")
    if not address:
        return None
    from fsspec.registry import known_implementations, registry

    protocol = protocol.partition("::")[0]
    known = known_implementations.get(protocol)
    if known and find_spec(known["class"].partition(".")[0]) is None:
        rule = f"needs a package that is not installed: {known['err']}"
        return Problem("data.store", store, rule, "install it, or use a folder")
    if known or protocol in registry:
        return None
    rule = f"has a protocol that fsspec does not support, {protocol}://"
    return Problem("data.store", store, rule, "use a folder, or an address like s3://bucket/data")


@rule("training.grad_acc", "hardware.devices", "hardware.nodes")
def check_grad_acc_split(grad_acc: int, devices: int, nodes: int) -> Problem | None:
    world_size = devices * nodes
    if grad_acc % world_size == 0:
        return None
    below = grad_acc // world_size * world_size
    choices = " or ".join(str(size) for size in (below, below + world_size) if size)
    return Problem(
        "training.grad_acc",
        str(grad_acc),
        f"is not divisible by hardware.devices x hardware.nodes = {world_size}: each device takes "
        "the same number of a step's micro-batches",
        f"set training.grad_acc to {choices} and adjust training.batch_size to keep tokens per "
        "step, or change hardware.devices",
    )


@rule("hardware.nodes", "hardware.rendezvous")
def check_rendezvous(nodes: int, rendezvous: str) -> Problem | None:
    host, _, port = rendezvous.rpartition(":")
    is_address = host and port.isdigit() and 0 < int(port) < 65_536
    if is_address or (nodes == 1 and not rendezvous):
        return None
    rule = f"is not host:port, which hardware.nodes = {nodes} needs for the machines to connect"
    remedy = "give an address of the first machine and a free port, e.g. 10.0.0.1:29400"
    return Problem("hardware.rendezvous", rendezvous, rule, remedy)


def valid_head_splits(n_embd: int, n_head: int, even: bool = False) -> list[tuple[int, int]]:
    """Return valid pairs (n_embd, n_head) near an invalid one: for this head count the next widths
    below and above, then for this width the next head counts below and above.

    Prefers head sizes that are multiples of 8, because GPU attention kernels pad others (PyTorch,
    scaled_dot_product_attention: last dimension a multiple of 8). `even`: even head sizes only.
    """
    unit = 2 if even else 1
    stride = n_head * (8 if n_embd > 8 * n_head else unit)
    below = n_embd // stride * stride
    widths = [(width, n_head) for width in (below, below + stride) if 0 < width <= MAX_WIDTH]
    divisors = [heads for heads in range(1, n_embd + 1) if n_embd % (heads * unit) == 0]
    aligned = [heads for heads in divisors if n_embd % (heads * 8) == 0] or divisors
    fewer = [heads for heads in aligned if heads < n_head][-1:]
    more = [heads for heads in aligned if heads > n_head][:1]
    return widths + [(n_embd, heads) for heads in fewer + more]
