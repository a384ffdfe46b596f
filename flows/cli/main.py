"""The command line: parse, call, print. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli import model as model_commands
from flows.cli import retrain, service
from flows.cli.options import (
    ConfigPath,
    Devices,
    Gpu,
    Network,
    Nodes,
    Overrides,
    hardware_overrides,
)
from flows.runtime.process_exit import exit_process
from gpt.config.loading import load_config, merge_overrides, read_toml
from gpt.errors import ConfigError, GPTError
from gpt.gc_tuning import tune_gc
from gpt.hardware.interconnect import DEFAULT_NETWORK_GBIT

if TYPE_CHECKING:
    from flows.compare import ComparisonResult
    from flows.runtime.outcome import Outcome
    from flows.runtime.variants import Variant
    from gpt.preflight.report import Report

CANNOT = 2
"""Exit code for what the user can mend, as a config that cannot work."""
FAILED = 1
"""A part of what was asked for has no result."""
INTERRUPTED = 130

app = typer.Typer(
    name="overnight",
    help="Pretrain a GPT overnight on one GPU: from Parquet to an evaluated, tracked model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(model_commands.app)
app.add_typer(retrain.app)
app.add_typer(service.app)


def main() -> None:
    """Entry of the console script. A message alone on standard error for what the user can mend."""
    tune_gc()
    try:
        app()
    except GPTError as error:
        print(error, file=sys.stderr)
        exit_process(CANNOT)
    except SystemExit as ended:
        exit_process(ended.code)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"overnight {version('overnight')}")
        raise typer.Exit


@app.callback()
def overnight(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    """Pretrain a GPT overnight on one GPU: from Parquet to an evaluated, tracked model."""


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, beside what this run has done before.")
    ] = False,
) -> None:
    """Validate, tokenise, train and evaluate; the same command again goes on where it stopped."""
    laid_over = merge_overrides({}, overrides or [])
    try:
        if not _took_part(config, laid_over):
            print_outcome(_pretrained(config, laid_over, fresh))
    except KeyboardInterrupt:  # before the flow could take it
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _took_part(config: str, laid_over: Mapping[str, Any]) -> bool:
    """Whether another machine leads the run, and this one has lent it its devices until its end.
    The machine that leads has Prefect and MLflow."""
    from gpt.training.distributed.rendezvous import is_main_machine

    try:
        checked = load_config(config, laid_over)
    except ConfigError:  # which is told where the run is started
        return False
    if is_main_machine(checked.hardware.rendezvous):
        return False
    from flows.runtime import environment

    environment.prepare(checked.run.root)
    from gpt.training.distributed.launch import join_training

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    print(f"taking part in the run that {checked.hardware.rendezvous} leads", flush=True)
    join_training(checked)
    print("the run has ended")
    return True


def _pretrained(config: str, laid_over: Mapping[str, Any], fresh: bool) -> Outcome:
    """Run the flow, unless the run is finished already. A config that cannot work is told at once,
    then recorded as a Failed run."""
    from gpt.preflight.report import run_preflight

    problems = run_preflight(config, laid_over, starting=True).problems
    if problems:  # told now; Prefect takes seconds to start
        print(ConfigError(*problems), file=sys.stderr, flush=True)
    elif not fresh and (finished := _finished(config, laid_over)):
        return finished

    from flows.runtime import environment

    environment.prepare(_root(config, laid_over))
    from flows.runtime.local_run import run_pretrain

    try:
        return run_pretrain(config, dict(laid_over), fresh)
    except ConfigError:
        if not problems:
            raise
        sys.exit(CANNOT)  # told above


def _finished(config: str, laid_over: Mapping[str, Any]) -> Outcome | None:
    from flows.runtime.outcome import find_finished_outcome

    outcome = find_finished_outcome(config, laid_over)
    if outcome:
        print(
            f"already finished at step {outcome.report.step} in {_short(outcome.folder)}; "
            "start anew with --fresh or another run.name"
        )
    return outcome


def _root(config: str, overrides: Mapping[str, Any]) -> Path:
    """`run.root` as far as it can be known, to record a config that cannot work as well."""
    try:
        raw = merge_overrides(read_toml(Path(config)), overrides)
        return Path(raw["run"]["root"])
    except (ConfigError, KeyError, TypeError):
        return Path("runs")


def print_outcome(outcome: Outcome) -> None:
    """The last lines of a run."""
    print(
        f"""
{outcome.name}: {outcome}
  run    {_short(outcome.folder)}
  model  {_short(outcome.model)}{_as_registered(outcome)}
look at it in Prefect, then in MLflow:
  {outcome.prefect_ui}
  {outcome.mlflow_ui}"""
    )


def _as_registered(outcome: Outcome) -> str:
    done = outcome.registered
    return f", registered as {done.name} version {done.version}, {done.alias}" if done else ""


def _short(path: Path) -> str:
    """Relative where it lies below this folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


@app.command()
def compare(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG CONFIG...", help="TOML configs.")],
    overrides: Overrides = None,
    tokens: Annotated[
        int | None, typer.Option(help="Train each on so many tokens, not its own max_steps.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Train each so many times, with other seeds.")] = 1,
    name: Annotated[str, typer.Option(help="Of the comparison; else the configs' names.")] = "",
) -> None:
    """Train several configs on the same data and say which is best; again, it goes on."""
    from flows.runtime.variants import expand_variants

    laid_over = merge_overrides({}, overrides or [])
    variants = expand_variants(configs, laid_over, tokens, seeds)
    if _all_have_problems(variants):
        raise typer.Exit(CANNOT)
    from flows.runtime import environment

    environment.prepare(next(variant.config.run.root for variant in variants if variant.config))
    from flows.runtime.local_run import run_compare

    try:
        compared = run_compare(configs, dict(laid_over), tokens, seeds, name)
    except KeyboardInterrupt:  # before the flow could take it
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    _print_compared(compared)
    if compared.failed:
        raise typer.Exit(FAILED)


def _all_have_problems(variants: Sequence[Variant]) -> bool:
    """What the preflight finds is told before anything is started."""
    from gpt.preflight.report import run_preflight

    blocked = 0
    for variant in variants:
        problems = run_preflight(variant.path, variant.overrides, starting=True).problems
        if problems:
            print(f"{variant.name}: {ConfigError(*problems)}", file=sys.stderr, flush=True)
            blocked += 1
    return blocked == len(variants)


def _print_compared(compared: ComparisonResult) -> None:
    print(
        f"""
{compared.markdown}
page   {_short(compared.page)}
look at it in Prefect, then in MLflow, where + unfolds the comparison's runs:
  {compared.prefect_ui}
  {compared.mlflow_ui}"""
    )


@app.command()
def validate(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="TOML configs.")],
    overrides: Overrides = None,
    gpu: Gpu = "auto",
    devices: Devices = None,
    nodes: Nodes = None,
    network_gbit: Network = DEFAULT_NETWORK_GBIT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what configs come to and whether they can work; reads no data and starts nothing."""
    from gpt.preflight.report import run_preflight

    laid_over = hardware_overrides(merge_overrides({}, overrides or []), devices, nodes)
    reports = [run_preflight(path, laid_over, gpu, network_gbit=network_gbit) for path in configs]
    if as_json:
        values = [report.as_json() for report in reports]
        print(json.dumps(values[0] if len(values) == 1 else values, indent=2))
    else:
        _print_reports(reports)
    if any(report.blocked for report in reports):
        raise typer.Exit(CANNOT)


def _print_reports(reports: Sequence[Report]) -> None:
    """One in full, several side by side. A blocked one goes to standard error."""
    from rich.console import Console

    from gpt.preflight.render import print_report, print_reports

    if len(reports) > 1:
        print_reports(reports, Console(highlight=False, width=_width()))
    else:
        console = Console(stderr=reports[0].blocked, highlight=False, width=_width())
        print_report(reports[0], console)


def _width() -> int | None:
    """The terminal's; where there is none, wide enough that no line of a table breaks."""
    return None if sys.stdout.isatty() else 160


@app.command()
def import_nanogpt(
    path: Annotated[Path, typer.Argument(metavar="FILE.py", help="A nanoGPT config file.")],
    data: Annotated[
        str, typer.Option("--data", metavar="PATH", help="Parquet to train on.")
    ] = "data/fineweb.parquet",
    gpu: Gpu = "auto",
) -> None:
    """Print a nanoGPT config as ours, without executing it; then check it, on standard error."""
    from rich.console import Console

    from gpt.exchange.nanogpt import convert_nanogpt
    from gpt.hardware.target_gpu import find_target_gpu
    from gpt.preflight.render import print_report
    from gpt.preflight.report import run_preflight_on_values

    imported = convert_nanogpt(path, data)
    print(imported.toml(), end="")
    report = run_preflight_on_values(str(path), imported.values, find_target_gpu(gpu))
    sys.stdout.flush()
    print_report(report, Console(stderr=True, highlight=False))
    if report.blocked:
        raise typer.Exit(CANNOT)


@app.command()
def tokenize(config: ConfigPath, overrides: Overrides = None) -> None:
    """Make the data set of a config, or find the one made before, and nothing else."""
    from flows.runtime import environment

    checked = load_config(config, merge_overrides({}, overrides or []))
    environment.prepare(checked.run.root)
    from tasks.tokenize_parquet import find_or_tokenize

    try:
        find_or_tokenize(checked)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def sync(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or its name.")],
    root: Annotated[Path, typer.Option("--root", help="Where runs lie (run.root).")] = Path("runs"),
    uri: Annotated[
        str, typer.Option("--uri", help="An MLflow server; left out: the one the run began with.")
    ] = "",
) -> None:
    """Send MLflow what it has missed of a run: metrics, files, status. Again, it sends nothing."""
    from flows.runtime import environment
    from gpt.training.run_dir import find_run_dir_by_name

    folder = find_run_dir_by_name(run, root)
    environment.prepare(root)
    from gpt.training.run_lock import run_lock
    from tasks.tracking.runs import sync_run

    with run_lock(folder):
        sent = sync_run(folder, uri)
    print(f"{_short(folder.resolve())}: {sent}")


@app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A data set's folder.")],
    count: Annotated[int, typer.Option("--samples", help="Documents to show of each side.")] = 2,
) -> None:
    """Check a data set's shards, say what is in it, and show how some documents begin."""
    from gpt.data.shards import read_manifest, verify_if_changed
    from gpt.data.summary import format_summary, read_samples

    manifest = read_manifest(dataset.parent if dataset.is_file() else dataset)
    verify_if_changed(manifest)
    print(format_summary(manifest))
    for name, split in (("training", manifest.train), ("validation", manifest.validation)):
        for text in read_samples(manifest, split, count):
            print(f"\n--- {name}\n{text}")


@app.command()
def sample_corpus(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The Parquet file to write.")],
) -> None:
    """Write real text that this machine already has: its Python packages' documentation."""
    from gpt.data.sample_corpus import write_sample_corpus

    path.parent.mkdir(parents=True, exist_ok=True)
    written = write_sample_corpus(path)
    print(f"{path}: {written.documents:,} documents, {written.text_bytes:,} bytes of text")


if __name__ == "__main__":
    main()
