"""The rows of a report on many devices."""

from __future__ import annotations

import math

from gpt.preflight.checks import gb
from gpt.preflight.layout import Layout
from gpt.preflight.report import Figures
from gpt.preflight.scaling import BASIS, Exchange, Scaling

_WHAT = {
    "ddp": "the whole model on each",
    "fsdp": "weights, optimizer states and exchanged gradients shared out",
}


def scaling_rows(figures: Figures, card: str) -> list[tuple[str, str]]:
    """Names and texts; where card or pace are not known, what is known without."""
    layout, scaling = figures.layout, figures.scaling
    rows = [
        ("devices", _devices(figures, layout, card)),
        ("sharding", f"{layout.sharding}: {_WHAT[layout.sharding]}"),
    ]
    if scaling is None:
        why = "n/a: of this card neither pace nor link is known"
        return [*rows, ("exchange and time", why)]
    return [*rows, *_exchange_rows(scaling), *_time_rows(figures, scaling)]


def _devices(figures: Figures, layout: Layout, card: str) -> str:
    hardware, training = figures.config.hardware, figures.config.training
    machines = f"{hardware.nodes:,} machines x " if hardware.nodes > 1 else ""
    return (
        f"{machines}{hardware.devices:,} {card} = {layout.devices:,}, each "
        f"{training.grad_acc // layout.devices:,} of {training.grad_acc:,} micro-batches a step"
    )


def _exchange_rows(scaling: Scaling) -> list[tuple[str, str]]:
    exchange = scaling.exchange
    sent = f"gradients {gb(exchange.gradient_bytes)}"
    if exchange.gathered_bytes:
        sent += f", weights {gb(exchange.micro_batches * exchange.gathered_bytes)}"
    links = [("inside a machine", scaling.inside)]
    links += [("between machines", scaling.between)] if scaling.between else []
    return [
        ("sent by each, a step", f"{gb(exchange.sent_bytes)}: {sent}, in float32"),
        *(
            (place, f"{link.name}: {gb(link.bytes_per_second)}/s each way; {link.source}")
            for place, link in links
        ),
    ]


def _time_rows(figures: Figures, scaling: Scaling) -> list[tuple[str, str]]:
    exchange, (low, high) = scaling.exchange, scaling.efficiency
    hidden, exposed = scaling.hours(figures.config.training.max_steps)
    return [
        (
            "a step",
            f"computes {_seconds(exchange.compute_seconds)}, exchanges "
            f"{_seconds(exchange.exchange_seconds)}: {_seconds(scaling.step_seconds_hidden)} with "
            f"all hidden that can be, {_seconds(scaling.step_seconds_exposed)} with nothing hidden",
        ),
        ("efficiency", f"{high:.0%} with all hidden, {low:.0%} with nothing hidden"),
        ("time", f"{_hours(hidden)} with all hidden, {_hours(exposed)} with nothing hidden"),
        ("the network binds", _binds(scaling)),
        ("", _remedy(figures, exchange)),
        ("basis", BASIS),
    ]


def _binds(scaling: Scaling) -> str:
    exchange = scaling.exchange
    here = (
        f"yes: for {exchange.link.name} a device waits {_seconds(exchange.waited_seconds)} a step"
        if exchange.binds
        else f"no: {exchange.link.name} is fast enough to hide all"
    )
    if scaling.binds_from is None:
        return f"{here}; nor would it bind with more machines"
    devices, nodes = scaling.binds_from
    place = f"{nodes:,} machines of {devices:,}" if nodes > 1 else f"{devices:,} devices"
    return f"{here}; at this micro-batch it binds from {place} on"


def _remedy(figures: Figures, exchange: Exchange) -> str:
    """What would hide the exchange, or how far it is from binding."""
    factor, size = exchange.needed_factor, figures.config.training.batch_size
    needed = exchange.link.bytes_per_second * factor
    return (
        f"hidden from training.batch_size = {max(1, math.ceil(size * factor)):,} on, or over a "
        f"link of {gb(needed)}/s ({needed * 8 / 1e9:,.0f} Gbit/s)"
    )


def _hours(count: float) -> str:
    return f"{count:,.1f} hours" if count >= 1 else f"{count * 60:,.1f} minutes"


def _seconds(count: float) -> str:
    return f"{count:,.2f} s" if count >= 1 else f"{count * 1000:,.1f} ms"
