"""Convert a nanoGPT config file to TOML without executing it.

A nanoGPT config is Python that overrides the defaults of `train.py`. Only its assignments of
literals, or of arithmetic between literals (`5 * 8`), are read; everything else is reported.
Missing settings get nanoGPT's defaults (train.py of commit 3adf61e), so that the config keeps its
meaning.
"""

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.config.schema import RunConfig
from gpt.errors import ConfigError, Problem

SETTINGS: dict[str, tuple[str, Any]] = {
    "out_dir": ("run.root", None),
    "wandb_project": ("tracking.experiment", "owt"),
    "n_layer": ("model.n_layer", 12),
    "n_head": ("model.n_head", 12),
    "n_embd": ("model.n_embd", 768),
    "block_size": ("model.block_size", 1024),
    "dropout": ("model.dropout", 0.0),
    "bias": ("model.bias", False),
    "learning_rate": ("optimizer.learning_rate", 6e-4),
    "weight_decay": ("optimizer.weight_decay", 1e-1),
    "beta1": ("optimizer.beta1", 0.9),
    "beta2": ("optimizer.beta2", 0.95),
    "grad_clip": ("optimizer.grad_clip", 1.0),
    "warmup_iters": ("schedule.warmup_steps", 2000),
    "decay_lr": ("", True),
    "min_lr": ("", 6e-5),
    "batch_size": ("training.batch_size", 12),
    "gradient_accumulation_steps": ("training.grad_acc", 40),
    "max_iters": ("training.max_steps", 600_000),
    "dtype": ("training.dtype", "bfloat16"),
    "compile": ("training.compile", True),
    "seed": ("training.seed", None),
    "log_interval": ("training.log_interval", 1),
    "eval_interval": ("evaluation.interval", 2000),
    "eval_iters": ("", 200),
    "device": ("", "cuda"),
    "wandb_run_name": ("", None),
}
"""nanoGPT's key -> our key with the same meaning, if there is one, and nanoGPT's default."""

NO_COUNTERPART = {
    "dataset": "nanoGPT's folder of prepared tokens; set data.source to Parquet files instead",
    "init_from": "re-run the same command to resume",
    "eval_only": "every run ends with an evaluation",
    "always_save_checkpoint": "a checkpoint is written every training.checkpoint_interval steps",
    "wandb_log": "every run is tracked in MLflow",
    "backend": "chosen by the device",
    "lr_decay_iters": "the learning rate decays until training.max_steps",
}


@dataclass(frozen=True)
class ConvertedConfig:
    """A nanoGPT config converted to our keys."""

    source: str
    values: dict[str, dict[str, Any]]
    """Section -> key -> value, as parsed from TOML."""
    unsupported: Mapping[str, str]
    """What was not converted -> why."""

    def to_toml(self) -> str:
        """Render the config as TOML, with a comment for everything that was not converted."""
        lines = [
            f"# Converted from nanoGPT's {self.source}; missing settings have nanoGPT's defaults."
        ]
        lines += [f"# not converted: {key}: {why}" for key, why in self.unsupported.items()]
        for section, entries in self.values.items():
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {_format_toml(value)}" for key, value in entries.items()]
        return "\n".join(lines) + "\n"


def convert_nanogpt(path: Path, data_source: str) -> ConvertedConfig:
    """Read a nanoGPT config and convert it; `data_source` replaces nanoGPT's dataset.

    Raises `ConfigError` for a file that is missing, unreadable or not Python.
    """
    assigned, unsupported = _read_assignments(_parse_python(path))
    for key in assigned:
        if key not in SETTINGS:
            unsupported[key] = NO_COUNTERPART.get(key, "nanoGPT has no such setting")
    if assigned.get("init_from", "scratch") == "scratch":
        unsupported.pop("init_from", None)
    defaults = {key: default for key, (_, default) in SETTINGS.items() if default is not None}
    settings = defaults | assigned
    if settings.get("lr_decay_iters") == settings["max_iters"]:
        unsupported.pop("lr_decay_iters", None)
    return ConvertedConfig(
        source=path.name,
        values=_convert_settings(settings, path.stem, data_source, unsupported),
        unsupported=unsupported,
    )


def _parse_python(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except FileNotFoundError:
        rule, remedy = "no such file", "give the path of a nanoGPT config"
    except OSError as error:
        rule, remedy = f"cannot be read: {error.strerror}", "make it readable"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        rule, remedy = f"is not Python: {error}", "give a nanoGPT config, e.g. config/train_gpt2.py"
    raise ConfigError(Problem(str(path), "", rule, remedy))


def _read_assignments(tree: ast.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the literal assigned last to each name, and the reasons for everything else."""
    values: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if not names or not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            skipped[f"line {node.lineno}"] = "is not an assignment of a literal"
            continue
        for name in names:
            try:
                values[name] = _evaluate_literal(node.value)
                skipped.pop(name, None)
            except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
                values.pop(name, None)
                skipped[name] = f"line {node.lineno} computes it, and the file is not executed"
    return values, skipped


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def _evaluate_literal(node: ast.expr) -> bool | int | float | str:
    """Evaluate a literal or arithmetic between numbers. Raises `ValueError` for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        sides = _evaluate_literal(node.left), _evaluate_literal(node.right)
        if not all(type(side) in (int, float) for side in sides):
            raise ValueError("not arithmetic between numbers")
        value = _OPERATORS[type(node.op)](*sides)
    else:
        value = ast.literal_eval(node)
    if not isinstance(value, bool | int | float | str):
        raise ValueError("not a bool, number or string")
    if isinstance(value, str):
        value.encode()  # raises UnicodeEncodeError, a ValueError, for half a surrogate pair
    return value


def _convert_settings(
    settings: Mapping[str, Any], stem: str, data_source: str, unsupported: dict[str, str]
) -> dict[str, dict[str, Any]]:
    names = map(_clean_run_name, (settings.get("wandb_run_name", ""), stem, "nanogpt"))
    flat: dict[str, Any] = {"run.name": next(filter(None, names))}
    for key, (our_key, _) in SETTINGS.items():
        if our_key and key in settings:
            flat[our_key] = settings[key]
    flat |= {
        "model.architecture": "gpt2",
        "data.source": data_source,
        "schedule.name": "cosine",
        "schedule.min_learning_rate_ratio": _min_learning_rate_ratio(settings),
        "training.checkpoint_interval": settings["eval_interval"],
        "evaluation.batch_size": settings["batch_size"],
        "evaluation.tokens": _product(settings, "eval_iters", "batch_size", "block_size"),
        "hardware.device": "auto" if settings["device"] == "cuda" else settings["device"],
    }
    if str(settings["device"]).startswith("mps"):
        unsupported["device"] = "only CUDA GPUs and the CPU are supported"
        flat["hardware.device"] = "cpu"
    sections: dict[str, dict[str, Any]] = {section: {} for section in RunConfig.model_fields}
    for key, value in flat.items():
        section, _, entry = key.partition(".")
        sections[section][entry] = value
    return sections


def _clean_run_name(value: Any) -> str:
    """Keep what a run name may contain: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("._-")[:100]


def _min_learning_rate_ratio(settings: Mapping[str, Any]) -> Any:
    """Return min_lr / learning_rate, or 1 without decay."""
    if not settings["decay_lr"]:
        return 1.0
    lowest, highest = settings["min_lr"], settings["learning_rate"]
    try:
        return float(f"{lowest / highest:.6g}")
    except (TypeError, ArithmeticError):
        return lowest


def _product(settings: Mapping[str, Any], *keys: str) -> Any:
    """Multiply integers. Returns a value that is not one as it is, for the config to refuse it."""
    values = [settings[key] for key in keys]
    return next((v for v in values if type(v) is not int), None) or math.prod(values)


def _format_toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # JSON strings are valid TOML, except for the one control character that JSON does not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
