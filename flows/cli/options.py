"""What several commands take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gpt.config.loading import merge_overrides

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A TOML config.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Lay a value over the config, as model.n_embd=576."
    ),
]
Gpu = Annotated[
    str, typer.Option("--gpu", metavar="NAME", help="A card, as rtx-4070; auto: this machine's.")
]
Devices = Annotated[
    int | None, typer.Option(help="Answer for so many devices a machine, not hardware.devices.")
]
Nodes = Annotated[int | None, typer.Option(help="Answer for so many machines, not hardware.nodes.")]
Network = Annotated[
    float, typer.Option(help="What a machine's network carries one way, Gbit/s; of several.")
]
SOMEWHERE = "asked-about:29400"
"""Stands for the rendezvous of machines that are only asked about."""


def hardware_overrides(
    laid_over: Mapping[str, Any], devices: int | None, nodes: int | None
) -> dict[str, Any]:
    """Overrides with the devices and machines that are asked about; None: as the config says."""
    hardware: dict[str, Any] = {}
    if devices is not None:
        hardware["devices"] = devices
    if nodes is not None:
        hardware |= {"nodes": nodes, "rendezvous": SOMEWHERE}
    return merge_overrides(laid_over, {"hardware": hardware} if hardware else {})
