"""Rules between the values of a config. Each is asked only where all its values are sound, so that
one wrong value is told once; all that fail are told together.

A rule is broken by what cannot work. What works but costs something is a warning of
`gpt.preflight.checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from gpt.errors import Problem

Rule = Callable[[Mapping[str, Any]], Problem | None]
RULES: list[Rule] = []

WIDEST = 65_536
"""Largest n_embd and n_head."""


def rule(*keys: str) -> Callable[[Callable[..., Problem | None]], Rule]:
    """Register a rule between the values of `keys`."""

    def register(check: Callable[..., Problem | None]) -> Rule:
        def asked(values: Mapping[str, Any]) -> Problem | None:
            if not all(key in values for key in keys):
                return None
            return check(*(values[key] for key in keys))

        RULES.append(asked)
        return asked

    return register


@rule("model.n_embd", "model.n_head", "model.architecture")
def check_head_split(n_embd: int, n_head: int, architecture: str) -> Problem | None:
    if n_embd % n_head == 0:
        return None
    pairs = valid_head_splits(n_embd, n_head, even=architecture == "nanochat")
    choices = ", ".join(f"{width}/{heads}" for width, heads in pairs)
    return Problem(
        "model.n_embd",
        str(n_embd),
        f"must be divisible by model.n_head = {n_head}: {n_embd} / {n_head} = "
        f"{n_embd / n_head:.2f}, but every head needs a whole number of channels",
        f"choose n_embd/n_head from {choices}",
    )


@rule("model.n_embd", "model.n_head", "model.architecture")
def check_rotary_head_size(n_embd: int, n_head: int, architecture: str) -> Problem | None:
    if architecture != "nanochat" or n_embd % n_head or n_embd // n_head % 2 == 0:
        return None
    pairs = valid_head_splits(n_embd, n_head, even=True)
    choices = ", ".join(f"{width}/{heads}" for width, heads in pairs)
    return Problem(
        "model.n_head",
        str(n_head),
        f"gives heads of {n_embd} / {n_head} = {n_embd // n_head} channels, but rotary positions "
        "turn channels in pairs, so nanochat needs an even number",
        f"choose n_embd/n_head from {choices}",
    )


@rule("schedule.warmup_steps", "training.max_steps")
def warmup_ends_before_the_run(warmup_steps: int, max_steps: int) -> Problem | None:
    if warmup_steps < max_steps:
        return None
    return Problem(
        "schedule.warmup_steps",
        str(warmup_steps),
        f"must be under training.max_steps = {max_steps}: the learning rate would never peak",
        f"set schedule.warmup_steps to at most {max(0, max_steps // 10)}",
    )


@rule("data.min_length", "data.max_length")
def some_length_is_allowed(min_length: int, max_length: int | None) -> Problem | None:
    if max_length is None or min_length <= max_length:
        return None
    return Problem(
        "data.min_length",
        str(min_length),
        f"must be at most data.max_length = {max_length}: no document could be kept",
        f"set data.min_length to at most {max_length}, or raise data.max_length",
    )


@rule("data.store")
def store_can_be_opened(store: str) -> Problem | None:
    protocol, address, _ = store.partition("://")
    if not address:
        return None
    from fsspec.registry import known_implementations, registry

    protocol = protocol.partition("::")[0]
    known = known_implementations.get(protocol)
    if known and find_spec(known["class"].partition(".")[0]) is None:
        rule = f"fsspec needs a package for such an address: {known['err']}"
        return Problem("data.store", store, rule, "install it, or name a folder")
    if known or protocol in registry:
        return None
    rule = f"fsspec knows no {protocol}://"
    return Problem("data.store", store, rule, "name a folder, or an address as s3://bucket/data")


@rule("training.grad_acc", "hardware.devices", "hardware.nodes")
def devices_share_the_step(grad_acc: int, devices: int, nodes: int) -> Problem | None:
    world = devices * nodes
    if grad_acc % world == 0:
        return None
    near = sorted({grad_acc // world * world, (grad_acc // world + 1) * world} - {0})
    return Problem(
        "training.grad_acc",
        str(grad_acc),
        f"must be divisible by hardware.devices x hardware.nodes = {world}: a step's micro-batches "
        "are shared out among the devices, each taking as many",
        f"set training.grad_acc to {' or '.join(map(str, near))}, and training.batch_size so that "
        "tokens a step stay what you want; or other hardware.devices",
    )


@rule("hardware.nodes", "hardware.rendezvous")
def nodes_have_a_meeting_place(nodes: int, rendezvous: str) -> Problem | None:
    host, colon, port = rendezvous.rpartition(":")
    if nodes == 1 and not rendezvous:
        return None
    if host and colon and port.isdigit() and 0 < int(port) < 65_536:
        return None
    return Problem(
        "hardware.rendezvous",
        rendezvous,
        f"must be host:port with hardware.nodes = {nodes}: the machines find one another there",
        "give an address of the first machine and a free port, as 10.0.0.1:29400",
    )


def valid_head_splits(n_embd: int, n_head: int, even: bool = False) -> list[tuple[int, int]]:
    """Pairs (n_embd, n_head) that divide, near one that does not: for this head count the widths
    next below and above, then for this width the head counts next below and above.

    Head sizes that are multiples of 8 come before any other, because the attention kernels of
    GPUs pad the rest (PyTorch, scaled_dot_product_attention: last dimension a multiple of 8).
    `even` allows even head sizes alone.
    """
    return _widths_near(n_embd, n_head, even) + _head_counts_near(n_embd, n_head, even)


def _widths_near(n_embd: int, n_head: int, even: bool) -> list[tuple[int, int]]:
    sizes = (8, 2) if even else (8, 1)
    stride = n_head * next((s for s in sizes if n_embd > n_head * s), sizes[-1])
    below = n_embd // stride * stride
    return [(width, n_head) for width in (below, below + stride) if 0 < width <= WIDEST]


def _head_counts_near(n_embd: int, n_head: int, even: bool) -> list[tuple[int, int]]:
    divisors = [
        heads
        for heads in range(1, n_embd + 1)
        if n_embd % heads == 0 and not (even and n_embd // heads % 2)
    ]
    aligned = [heads for heads in divisors if n_embd // heads % 8 == 0] or divisors
    below = [heads for heads in aligned if heads < n_head][-1:]
    above = [heads for heads in aligned if heads > n_head][:1]
    return [(n_embd, heads) for heads in below + above]
