"""Generate the files that are computed from code: configs/README.md (every setting),
configs/schema.json (JSON schema of a config) and the table of model sizes in README.md.

Run `python -m docs.generate` to write them; a test checks that they are up to date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpt.config.loading import load_config
from gpt.config.schema import RunConfig
from gpt.hardware.gpus import find_gpu
from gpt.markdown import render_table
from gpt.preflight.checks import gib
from gpt.preflight.memory import estimate_memory
from gpt.preflight.parameters import count_parameters
from gpt.preflight.render import format_hours
from gpt.preflight.time import nominal_throughput

BEGIN = "<!-- sizes: written by `python -m docs.generate` -->"
END = "<!-- end of sizes -->"
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
GPU = "rtx-4070"
LIMITS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
}
SIZES = (
    ("gpt-480", None),
    ("gpt-576", (512, 8)),
    ("gpt-576", (512, 16)),
    ("gpt-576", None),
    ("gpt-720", None),
    ("gpt-768", None),
)
"""A shipped config, and width and heads that override its own."""


def render_sizes_table(configs: Path) -> str:
    """Return a Markdown table of memory and hours by model size, between its marks."""
    gpu = find_gpu(GPU)
    assert gpu is not None, f"{GPU} is not in the table"
    rows = []
    for name, split in SIZES:
        overrides = [f"model.n_embd={split[0]}", f"model.n_head={split[1]}"] if split else []
        config = load_config(configs / f"{name}.toml", overrides)
        model, needed = config.model, estimate_memory(config, gpu=gpu).needed_bytes
        pace, tokens = nominal_throughput(config, gpu), config.total_tokens
        hours = (tokens / pace.fastest / 3600, tokens / pace.slowest / 3600)
        command = [f"configs/{name}.toml", *(f"--set {override}" for override in overrides)]
        rows.append(
            (
                f"{model.n_layer}/{model.n_head}/{model.n_embd}",
                model.architecture,
                str(model.n_embd // model.n_head),
                f"{count_parameters(model).total / 1e6:.1f}M",
                f"{gib(needed)}{'' if needed <= gpu.memory_bytes else ' (does not fit)'}",
                format_hours(hours).removesuffix(" hours"),
                f"`{' '.join(command)}`",
            )
        )
    heads = (
        *("layers/heads/width", "network", "head size", "parameters"),
        *(f"memory on a {gpu.name.removeprefix('NVIDIA ')}", "hours", "config"),
    )
    return "\n".join([BEGIN, render_table(rows, heads), END])


def replace_sizes_table(text: str, table: str) -> str:
    """Replace what is between the marks; return the text unchanged if there are none."""
    if BEGIN not in text or END not in text:
        return text
    before, _, rest = text.partition(BEGIN)
    return before + table + rest.partition(END)[2]


def render_settings_page() -> str:
    """Return a Markdown page of every setting: meaning, default and limits."""
    schema = json.loads(render_json_schema())
    lines = [
        "# Settings",
        "",
        "Every setting of a config, generated from `gpt/config/schema.py` by "
        "`python -m docs.generate`. Any can be overridden on the command line: "
        "`overnight run CONFIG --set section.key=value`. To see memory and time of a config on "
        "your GPU: `overnight validate CONFIG --gpu rtx-4070`.",
    ]
    for name, reference in schema["properties"].items():
        section = schema["$defs"][reference["$ref"].rpartition("/")[2]]
        rows = [
            (f"`{key}`", _default(key, field, section), _meaning(field))
            for key, field in section["properties"].items()
        ]
        lines += ["", f"## [{name}]", "", render_table(rows, ("key", "default", "meaning"))]
    return "\n".join(lines) + "\n"


def _default(key: str, field: dict[str, Any], section: dict[str, Any]) -> str:
    if key in section.get("required", ()):
        return "required"
    return f"`{json.dumps(field['default'])}`" if "default" in field else ""


def _meaning(field: dict[str, Any]) -> str:
    limits = [f"{sign} {field[name]:,}" for name, sign in LIMITS.items() if name in field]
    if "enum" in field:
        limits.append(" or ".join(f"`{choice}`" for choice in field["enum"]))
    return f"{field['description']} ({', '.join(limits)})" if limits else field["description"]


def render_json_schema() -> str:
    """Return the JSON schema of a config, with which editors complete and check TOML files."""
    schema = {"$schema": SCHEMA_DIALECT, **_simplify(RunConfig.model_json_schema())}
    return json.dumps(schema, indent=1) + "\n"


def _simplify(node: Any) -> Any:
    """Remove what means nothing in TOML: titles, nulls, Python's formats and line breaks."""
    if isinstance(node, list):
        return [_simplify(item) for item in node if item != {"type": "null"}]
    if not isinstance(node, dict):
        return node
    result: dict[str, Any] = {
        key: " ".join(value.split()) if key == "description" else _simplify(value)
        for key, value in node.items()
        if key not in ("title", "format") and value is not None
    }
    choices = result.get("anyOf", ())
    return {**result.pop("anyOf")[0], **result} if len(choices) == 1 else result


def main(root: Path) -> None:
    configs, readme = root / "configs", root / "README.md"
    (configs / "README.md").write_text(render_settings_page(), encoding="utf-8")
    (configs / "schema.json").write_text(render_json_schema(), encoding="utf-8")
    text = replace_sizes_table(readme.read_text(encoding="utf-8"), render_sizes_table(configs))
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path.cwd())
