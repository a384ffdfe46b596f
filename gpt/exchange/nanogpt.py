"""nanoGPT's config files read as ours, without executing them.

Such a file is Python that `train.py` runs over its own defaults. Here its syntax tree is read, and
assignments of literals and of arithmetic between literals (`5 * 8`) are taken; what else stands
there is named. What the file leaves out has nanoGPT's default (train.py of commit 3adf61e), so that
the config means what it meant there.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.errors import ConfigError, Problem

DEFAULTS: dict[str, Any] = {
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "wandb_project": "owt",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600_000,
    "weight_decay": 1e-1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "min_lr": 6e-5,
    "device": "cuda",
    "dtype": "bfloat16",
    "compile": True,
}

DIRECT = {
    "out_dir": "run.root",
    "n_layer": "model.n_layer",
    "n_head": "model.n_head",
    "n_embd": "model.n_embd",
    "block_size": "model.block_size",
    "dropout": "model.dropout",
    "bias": "model.bias",
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "beta1": "optimizer.beta1",
    "beta2": "optimizer.beta2",
    "grad_clip": "optimizer.grad_clip",
    "warmup_iters": "schedule.warmup_steps",
    "batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.grad_acc",
    "max_iters": "training.max_steps",
    "dtype": "training.dtype",
    "compile": "training.compile",
    "seed": "training.seed",
    "log_interval": "training.log_interval",
    "eval_interval": "evaluation.interval",
    "wandb_project": "tracking.experiment",
}
"""Keys that mean the same there and here."""

NO_COUNTERPART = {
    "dataset": "a folder of tokens that nanoGPT prepared; ours are made from Parquet, data.source",
    "init_from": "starting is resuming: the same command goes on where it stopped",
    "eval_only": "every run is evaluated at its end",
    "always_save_checkpoint": "a checkpoint is written every training.checkpoint_interval steps",
    "wandb_log": "every run is tracked in MLflow",
    "backend": "one device needs none",
    "lr_decay_iters": "the learning rate falls until training.max_steps",
}

SECTIONS = (
    *("run", "model", "data", "optimizer", "schedule"),
    *("training", "evaluation", "tracking", "hardware"),
)
"""In the order in which our configs have them."""
NUMBERS = ("learning_rate", "min_lr", "weight_decay", "grad_clip", "dropout", "beta1", "beta2")
"""Where our type is a float, and Python writes 1 as well."""


@dataclass(frozen=True)
class Imported:
    """A nanoGPT config in our terms."""

    source: str
    values: dict[str, dict[str, Any]]
    """Section -> key -> value, as TOML would give it."""
    given: tuple[str, ...]
    """nanoGPT's keys that stand in the file and were taken."""
    left_out: Mapping[str, str]
    """What stands in the file and was not taken -> why."""

    def toml(self) -> str:
        """Our config, with what has no counterpart named in its head."""
        lines = [f"# From nanoGPT's {self.source}; what that leaves out is nanoGPT's default."]
        lines += [f"# no counterpart: {key}: {why}" for key, why in self.left_out.items()]
        for section, entries in self.values.items():
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {_toml(value)}" for key, value in entries.items()]
        return "\n".join(lines) + "\n"


def convert_nanogpt(path: Path, data_source: str) -> Imported:
    """Raises `ConfigError` for a file that is missing, unreadable or not Python.

    `data_source` stands for nanoGPT's data set, which has no counterpart.
    """
    assigned, strange = _assignments(_syntax_tree(path))
    known = DEFAULTS.keys() | DIRECT.keys() | {"wandb_run_name"}
    left_out = dict(strange)
    for key in assigned:
        if key not in known:
            left_out[key] = NO_COUNTERPART.get(key, "nanoGPT has no such setting")
    if assigned.get("init_from", "scratch") == "scratch":
        left_out.pop("init_from", None)
    settings = DEFAULTS | assigned
    if settings.get("lr_decay_iters") == settings["max_iters"]:
        left_out.pop("lr_decay_iters", None)
    return Imported(
        source=path.name,
        values=_ours(settings, path.stem, data_source, left_out),
        given=tuple(key for key in assigned if key not in left_out),
        left_out=left_out,
    )


# --- their file ----------------------------------------------------------------------------------


def _syntax_tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes())
    except FileNotFoundError:
        rule, remedy = "there is no such file", "give the path of a nanoGPT config"
    except OSError as error:
        rule, remedy = f"the file cannot be read: {error.strerror}", "give a readable file"
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        rule, remedy = f"is not Python: {error}", "give a nanoGPT config, as config/train_gpt2.py"
    raise ConfigError(Problem(str(path), "", rule, remedy))


def _assignments(tree: ast.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Literal values by name, the last one counting, and what is no such assignment."""
    values: dict[str, Any] = {}
    strange: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        names = _targets(node)
        if not names or not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            strange[f"line {node.lineno}"] = "is no assignment of a literal"
            continue
        for name in names:
            try:
                values[name] = _literal(node.value)
                strange.pop(name, None)
            except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
                values.pop(name, None)
                strange[name] = f"line {node.lineno} computes it, and nothing is executed here"
    return values, strange


def _targets(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def _literal(node: ast.expr) -> bool | int | float | str:
    """The value of a literal, or of arithmetic between numbers; ValueError for anything else."""
    if not isinstance(node, ast.BinOp):
        value = ast.literal_eval(node)
        if not isinstance(value, bool | int | float | str):
            raise ValueError("no setting has such a value")
        if isinstance(value, str):
            value.encode()  # half a surrogate pair is no text; that error is a ValueError
        return value
    left, right = _literal(node.left), _literal(node.right)
    combine = _OPERATORS.get(type(node.op))
    if combine is None or not all(type(side) in (int, float) for side in (left, right)):
        raise ValueError("no arithmetic between numbers")
    result: int | float = combine(left, right)
    return result


# --- our config ----------------------------------------------------------------------------------


def _ours(
    settings: Mapping[str, Any], stem: str, data_source: str, left_out: dict[str, str]
) -> dict[str, dict[str, Any]]:
    name = settings.get("wandb_run_name", stem)
    flat: dict[str, Any] = {"run.name": _run_name(name) or _run_name(stem) or "nanogpt"}
    for theirs, ours in DIRECT.items():
        if theirs in settings:
            value = settings[theirs]
            flat[ours] = float(value) if theirs in NUMBERS and type(value) is int else value
    flat["model.architecture"] = "gpt2"
    flat["data.source"] = data_source
    flat["schedule.name"] = "cosine"
    flat["schedule.min_learning_rate_ratio"] = _lowest_share(settings)
    flat["training.checkpoint_interval"] = settings["eval_interval"]
    flat["evaluation.batch_size"] = settings["batch_size"]
    flat["evaluation.tokens"] = _product(settings, "eval_iters", "batch_size", "block_size")
    flat["hardware.device"] = _device(settings["device"], left_out)
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value in flat.items():
        section, _, entry = key.partition(".")
        sections[section][entry] = value
    return sections


def _run_name(value: Any) -> str:
    """What our names may hold: letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("._-")[:100]


def _lowest_share(settings: Mapping[str, Any]) -> Any:
    """min_lr / learning_rate; 1 where nanoGPT does not let it fall."""
    if not settings["decay_lr"]:
        return 1.0
    lowest, highest = settings["min_lr"], settings["learning_rate"]
    try:
        return float(f"{lowest / highest:.6g}")
    except (TypeError, ArithmeticError):
        return lowest


def _product(settings: Mapping[str, Any], *keys: str) -> Any:
    """Of whole numbers; whatever else one of them is, for the rules to tell of it."""
    values = [settings[key] for key in keys]
    return next((v for v in values if type(v) is not int), None) or math.prod(values)


def _device(value: Any, left_out: dict[str, str]) -> Any:
    if value == "cuda":
        return "auto"
    if isinstance(value, str) and value.startswith("mps"):
        left_out["device"] = "there are GPUs by CUDA, and the CPU"
        return "cpu"
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    # JSON's strings are TOML's, but for the one control character that JSON lets stand.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
