"""The variants of a comparison: each config with each seed, trained in its own process.

Does not import Prefect or torch, so that configs that cannot be compared are refused at once.
"""

import json
import math
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.runtime import environment
from flows.runtime.process_exit import die_with_parent, stop_process
from gpt.config.loading import merge_overrides
from gpt.config.schema import DataSection, RunConfig, fingerprint
from gpt.errors import ComparisonError, ConfigError, GPTError, Problem
from gpt.files import write_text
from gpt.gc_tuning import tune_gc
from gpt.preflight.report import run_preflight
from gpt.training.run_dir import run_identity

EXECUTION_KEYS = ("engine", "workers", "runner", "cluster", "store")
"""Keys of [data] that say how and where text is tokenized; the tokens do not depend on them."""
SHARED_KEYS = (
    "run.root",
    *(f"data.{key}" for key in DataSection.model_fields if key not in EXECUTION_KEYS),
    *("evaluation.tokens", "evaluation.hellaswag", "evaluation.lambada"),
    *("evaluation.benchmark_examples", "tracking.experiment", "tracking.uri"),
)
"""Keys that must be equal for the results to be comparable."""
STOP_SECONDS = 24.0
"""How long the process may take to stop; Prefect kills its parent after 29 s."""


@dataclass(frozen=True)
class Variant:
    """One config with one seed."""

    name: str
    """The name of the config, the same for all its seeds."""
    path: str
    overrides: dict[str, Any]
    """All overrides of the file, including the run's name, seed and length."""
    config: RunConfig | None
    """None if the config is invalid."""
    failure: str
    """Why it cannot be trained here; empty if it can."""


def expand_variants(
    paths: Sequence[str], overrides: Mapping[str, Any], tokens: int | None, seeds: int
) -> list[Variant]:
    """Combine every config with every seed.

    The first seeds of all configs come first, so that an interrupted comparison has seen each
    config. A config that the preflight refuses is a variant with a failure. Raises `ConfigError` if
    all configs are invalid, or if they differ in their data or evaluation.
    """
    if len(paths) < 2:
        rule = "a comparison needs a second config"
        raise ConfigError(Problem("CONFIG", " ".join(paths), rule, "name at least two configs"))
    for option, value in (("--seeds", seeds), ("--tokens", tokens)):
        if value is not None and value < 1:
            raise ConfigError(Problem(option, str(value), "must be at least 1", "raise it"))
    reports = {path: run_preflight(path, overrides) for path in paths}
    valid = {path: report.figures.config for path, report in reports.items() if report.figures}
    if not valid:  # a wrong override is a problem of every config, but reported once
        raise ConfigError(*dict.fromkeys(p for r in reports.values() for p in r.problems))
    _check_comparable(valid)
    names = _choose_names(paths, valid)
    return [
        _build_variant(names[path], path, overrides, valid.get(path), tokens, number)
        for number in range(seeds)
        for path in reports
        if number == 0 or path in valid
    ]


def _check_comparable(configs: Mapping[str, RunConfig]) -> None:
    (first, expected), *others = ((path, config.flatten()) for path, config in configs.items())
    problems = [
        Problem(
            key,
            str(found[key]),
            f"{path} differs from {first}, which has {expected[key]}; models can only be compared "
            "on the same data and evaluation",
            f"set the same value in all configs: --set {key}=...",
        )
        for path, found in others
        for key in SHARED_KEYS
        if found[key] != expected[key]
    ]
    if problems:
        raise ConfigError(*problems)


def _choose_names(paths: Sequence[str], configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """Return the names of the configs if they are unique, else names made from the paths."""
    for name_of in (
        lambda path: configs[path].run.name if path in configs else Path(path).stem,
        lambda path: _to_name(Path(path).stem),
    ):
        names = {path: name_of(path) for path in paths}
        if len(set(names.values())) == len(names):
            return names
    return {path: _to_name(str(Path(path).with_suffix(""))) for path in paths}


def _to_name(text: str) -> str:
    return re.sub("[^A-Za-z0-9._-]+", "-", text).strip("-._") or "config"


def _build_variant(
    name: str,
    path: str,
    overrides: Mapping[str, Any],
    config: RunConfig | None,
    tokens: int | None,
    number: int,
) -> Variant:
    merged = dict(overrides)
    if config:
        own: dict[str, Any] = {"run": {"name": name}}
        if number:  # the first seed has its config's seed and name, as a run outside a comparison
            seed = config.training.seed + number
            own = {"run": {"name": f"{name}-seed{seed}"}, "training": {"seed": seed}}
        merged = merge_overrides(merge_overrides(overrides, own), _length_overrides(config, tokens))
    report = run_preflight(path, merged, starting=True)
    failure = str(ConfigError(*report.problems)) if report.problems else ""
    return Variant(name, path, merged, report.figures.config if report.figures else None, failure)


def _length_overrides(config: RunConfig, tokens: int | None) -> dict[str, Any]:
    """Set `max_steps` for a number of tokens; in a shorter run, scale the warm-up down with it.

    The cool-down is a fraction of the steps anyway.
    """
    if tokens is None:
        return {}
    steps = math.ceil(tokens / config.tokens_per_step)
    scale = min(1.0, steps / config.training.max_steps)
    warmup_steps = round(config.schedule.warmup_steps * scale)
    return {"training": {"max_steps": steps}, "schedule": {"warmup_steps": warmup_steps}}


def comparison_folder(root: Path, variants: Sequence[Variant], name: str) -> Path:
    """Create `<root>/compare/<name>-<8 hex digits>`, the same folder for the same variants."""
    values = {
        f"{number}": run_identity(variant.config, "") + str(variant.config.training.max_steps)
        for number, variant in enumerate(variants)
        if variant.config
    }
    names = dict.fromkeys(variant.name for variant in variants)
    folder = root / "compare" / f"{name or '-vs-'.join(names)[:80]}-{fingerprint(values)[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def train_in_subprocess(variant: Variant, parent: Path) -> Path:
    """Train a variant of the comparison in the folder `parent` and return its run folder.

    It has its own process: a device error or the kernel's out-of-memory killer ends only this
    variant, and each one starts with an empty device and has its own peak of memory. Anything that
    stops this process stops the other one first. Raises `ComparisonError` if the run fails.
    """
    assert variant.config
    parent = parent.resolve()
    result_file = parent / f"{variant.config.run.name}.json"
    result_file.unlink(missing_ok=True)
    folders = [str(path) for path in (variant.config.run.root, parent, result_file)]
    request = json.dumps([variant.path, variant.overrides, *folders])
    # A process that outlived this one would still hold the lock of the run.
    child = subprocess.Popen(
        [sys.executable, "-m", "flows.runtime.variants", request],
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    try:
        code = child.wait()
    except BaseException:
        stop_process(child, STOP_SECONDS)
        raise
    result = json.loads(result_file.read_bytes()) if result_file.exists() else {}
    if "folder" in result:
        return Path(result["folder"])
    end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = result.get("failure") or f"its process ended with {end}"
    remedy = "fix this and re-run the same comparison; finished configs are skipped"
    raise ComparisonError(Problem(variant.name, "", reason, remedy))


def main() -> None:
    """Run the flow `pretrain` as the request says, and write the run folder or the failure."""
    tune_gc()
    path, overrides, root, parent, result_file = json.loads(sys.argv[1])
    environment.prepare(Path(root))
    from flows.runtime.local_run import run_pretrain
    from tasks.display import log_info

    try:
        outcome = run_pretrain(path, overrides, parent=parent)
        log_info(f"{outcome.name}: validation loss {outcome.report.loss:.4f}")
        result = {"folder": str(outcome.folder)}
    except GPTError as error:
        print(error, file=sys.stderr)
        result = {"failure": str(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"failure": f"{type(error).__name__}: {error}"}
    write_text(Path(result_file), json.dumps(result))


if __name__ == "__main__":
    main()
