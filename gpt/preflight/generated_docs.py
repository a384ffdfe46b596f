"""Pages that are computed, so that they cannot be wrong: README's table of sizes, and every setting
in configs/README.md.

`python -m gpt.preflight.generated_docs` writes them; a test holds the files to what it would write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gpt.config.loading import load_config
from gpt.config.schema import RunConfig
from gpt.hardware.gpus import find_gpu
from gpt.preflight.checks import gib
from gpt.preflight.memory import estimate_memory
from gpt.preflight.parameters import count_parameters
from gpt.preflight.render import markdown_table
from gpt.preflight.time import estimate_throughput, hours

BEGIN = "<!-- sizes: written by `python -m gpt.preflight.generated_docs` -->"
END = "<!-- end of sizes -->"
CARD = "rtx-4070"
SIZES = (
    ("gpt-480", None),
    ("gpt-576", (512, 8)),
    ("gpt-576", (512, 16)),
    ("gpt-576", None),
    ("gpt-720", None),
    ("gpt-768", None),
)
"""A shipped config, and the width and heads that are laid over it."""


def render_sizes_table(configs: Path) -> str:
    """What each size comes to on a card with 12 GB, as Markdown between its marks."""
    card = find_gpu(CARD)
    assert card is not None, f"{CARD} is not in the table"
    rows = []
    for name, split in SIZES:
        overrides = [f"model.n_embd={split[0]}", f"model.n_head={split[1]}"] if split else []
        config = load_config(configs / f"{name}.toml", overrides)
        model, pace = config.model, estimate_throughput(config, card)
        needed = estimate_memory(config).needed_bytes
        asked = " ".join(f"--set {override}" for override in overrides)
        rows.append(
            (
                f"{model.n_layer}/{model.n_head}/{model.n_embd}",
                model.architecture,
                str(model.n_embd // model.n_head),
                f"{count_parameters(model).total / 1e6:.1f}M",
                f"{gib(needed)}{'' if needed <= card.memory_bytes else ' (does not fit)'}",
                f"{hours(config, pace):.1f}",
                f"`configs/{name}.toml{' ' if asked else ''}{asked}`",
            )
        )
    heads = (
        *("layers/heads/width", "network", "head size", "parameters"),
        *(f"memory on a {card.name.removeprefix('NVIDIA ')}", "hours there", "config"),
    )
    return "\n".join([BEGIN, *markdown_table(heads, rows), END])


def replace_sizes_table(text: str, table: str) -> str:
    """`text` with what stands between the marks replaced; unchanged where there are none."""
    if BEGIN not in text or END not in text:
        return text
    before, _, rest = text.partition(BEGIN)
    return before + table + rest.partition(END)[2]


def render_settings_page() -> str:
    """Every setting with its meaning, default and limits, from the fields themselves."""
    lines = [
        "# Settings",
        "",
        "Every value a config can hold, written by `python -m gpt.preflight.generated_docs` from "
        "`gpt/config/schema.py`. Any can be laid over a config: "
        "`overnight run CONFIG --set section.key=value`. What a config comes to on your card: "
        "`overnight validate CONFIG --gpu rtx-4070`.",
    ]
    for section, field in RunConfig.model_fields.items():
        fields: dict[str, FieldInfo] = field.annotation.model_fields  # type: ignore[union-attr]
        rows = [(f"`{key}`", _default(info), _meaning(info)) for key, info in fields.items()]
        lines += ["", f"## [{section}]", "", *markdown_table(("key", "default", "meaning"), rows)]
    return "\n".join(lines) + "\n"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value: Any = None if info.default is PydanticUndefined else info.default
    if value is None:
        return ""
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{json.dumps(plain, default=str)}`"


def _meaning(info: FieldInfo) -> str:
    text = " ".join((info.description or "").split())
    limits = ", ".join(_limits(info))
    return f"{text} ({limits})" if limits else text


def _limits(info: FieldInfo) -> list[str]:
    """Bounds and choices as `>= 1`; those of an optional value lie one level deeper."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    inner = [part for arg in get_args(info.annotation) for part in getattr(arg, "__metadata__", ())]
    found = []
    for part in [*info.metadata, *inner]:
        for constraint in getattr(part, "metadata", [part]):
            for name, sign in signs.items():
                bound = getattr(constraint, name, None)
                if bound is not None:
                    found.append(f"{sign} {bound:,}")
    choices = [arg for arg in get_args(info.annotation) if isinstance(arg, str)]
    return found + ([" or ".join(f"`{choice}`" for choice in choices)] if choices else [])


def main(root: Path) -> None:
    (root / "configs" / "README.md").write_text(render_settings_page(), encoding="utf-8")
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(
        replace_sizes_table(text, render_sizes_table(root / "configs")), encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path.cwd())
