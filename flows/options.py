"""What several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

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
