"""The commands that plan and train: run, validate, compare, retrain, import-nanogpt."""

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.options import (
    USER_ERROR,
    ConfigPath,
    ConfigPaths,
    Gpu,
    Json,
    Overrides,
    display_path,
    print_links,
    resumable,
)
from flows.runtime.environment import prepare
from gpt.config.loading import load_config, merge_overrides, read_run_section
from gpt.errors import ConfigError
from gpt.hardware.interconnect import DEFAULT_NETWORK_GBIT
from gpt.preflight.report import run_preflight, run_preflight_on_values

if TYPE_CHECKING:
    from flows.runtime.outcome import Outcome

app = typer.Typer(rich_markup_mode=None)

INCOMPLETE = 1
"""Exit code if part of a comparison has no result."""
PLACEHOLDER_RENDEZVOUS = "placeholder:29400"
"""Rendezvous of machines that are only planned for."""
PAGE_WIDTH = 160
"""Columns of a report that is not printed to a terminal: no line of a table wraps."""


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start a new run instead of resuming.")
    ] = False,
) -> None:
    """Validate, tokenize, train, evaluate and register a model.

    Re-run the same command to resume.
    """
    values = merge_overrides({}, overrides or [])
    with resumable():
        if _join_as_worker(config, values):
            return
        outcome = _pretrain(config, values, fresh)
    print(f"\n{outcome.name}: {outcome}\n  run    {display_path(outcome.folder)}")
    model = f"  model  {display_path(outcome.model)}"
    if version := outcome.registered:
        model += f", registered as {version.name} version {version.version}, {version.alias}"
    print(model)
    print_links(outcome.links)


def _join_as_worker(config: str, overrides: Mapping[str, Any]) -> bool:
    """Train as a worker if another machine is the main one of this run. Return whether it was.

    Only the main machine has Prefect and MLflow.
    """
    from gpt.training.distributed.rendezvous import is_main_machine

    try:
        checked = load_config(config, overrides)
    except ConfigError:  # reported where the run starts
        return False
    if is_main_machine(checked.hardware.rendezvous):
        return False
    prepare(checked.run.root)
    from gpt.training.distributed.launch import join_training

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    print(f"joining the run of {checked.hardware.rendezvous} as a worker", flush=True)
    join_training(checked)
    print("the run has ended")
    return True


def _pretrain(config: str, overrides: dict[str, Any], fresh: bool) -> "Outcome":
    """Run the flow unless the run is finished. An invalid config is reported at once and then
    recorded as a Failed flow run."""
    from flows.runtime.outcome import find_finished_outcome

    if problems := run_preflight(config, overrides, starting=True).problems:
        # Printed before Prefect starts, which takes seconds.
        print(ConfigError(*problems), file=sys.stderr, flush=True)
    elif not fresh and (finished := find_finished_outcome(config, overrides)):
        print(
            f"already finished at step {finished.report.step} in {display_path(finished.folder)}; "
            "use --fresh or another run.name to train again"
        )
        return finished
    prepare(Path(str(read_run_section(config, overrides).get("root", "runs"))))
    from flows.runtime.embedded_api import launch_api

    launch_api()
    from flows.runtime.local_run import run_pretrain

    try:
        return run_pretrain(config, overrides, fresh)
    except ConfigError:
        if not problems:
            raise
        sys.exit(USER_ERROR)  # already reported


@app.command()
def validate(
    configs: ConfigPaths,
    overrides: Overrides = None,
    gpu: Gpu = "auto",
    devices: Annotated[
        int | None, typer.Option(help="Plan for this many devices per machine.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Plan for this many machines.")] = None,
    network_gbit: Annotated[
        float, typer.Option(help="Network bandwidth per machine and direction, Gbit/s.")
    ] = DEFAULT_NETWORK_GBIT,
    as_json: Json = False,
) -> None:
    """Check configs and estimate memory, time and disk space.

    Reads no data and starts nothing.
    """
    values = merge_overrides({}, overrides or [])
    if devices is not None:
        values = merge_overrides(values, {"hardware": {"devices": devices}})
    if nodes is not None:
        planned = {"nodes": nodes, "rendezvous": PLACEHOLDER_RENDEZVOUS}
        values = merge_overrides(values, {"hardware": planned})
    reports = [run_preflight(path, values, gpu, network_gbit=network_gbit) for path in configs]
    blocked = any(report.blocked for report in reports)
    if as_json:
        written = [report.as_json() for report in reports]
        print(json.dumps(written[0] if len(written) == 1 else written, indent=2))
    else:
        from rich.console import Console

        from gpt.preflight.render import print_report, print_reports

        width = None if sys.stdout.isatty() else PAGE_WIDTH
        if len(reports) > 1:
            print_reports(reports, Console(highlight=False, width=width))
        else:
            print_report(reports[0], Console(stderr=blocked, highlight=False, width=width))
    if blocked:
        raise typer.Exit(USER_ERROR)


@app.command()
def compare(
    configs: ConfigPaths,
    overrides: Overrides = None,
    tokens: Annotated[
        int | None, typer.Option(help="Training tokens per config (default: its max_steps).")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs per config, each with another seed.")] = 1,
    name: Annotated[
        str, typer.Option(help="Name of the comparison (default: the configs' names).")
    ] = "",
) -> None:
    """Train several configs on the same data and compare them.

    If interrupted, re-run it; finished configs are skipped.
    """
    from flows.runtime.variants import expand_variants

    values = merge_overrides({}, overrides or [])
    variants = expand_variants(configs, values, tokens, seeds)
    for variant in variants:
        if variant.failure:
            print(f"{variant.name}: {variant.failure}", file=sys.stderr, flush=True)
    if all(variant.failure for variant in variants):
        raise typer.Exit(USER_ERROR)
    prepare(next(variant.config.run.root for variant in variants if variant.config))
    from flows.compare import ComparisonResult
    from flows.compare import compare as flow
    from flows.runtime.local_run import run_flow

    parameters = {"configs": configs, "overrides": values, "tokens": tokens}
    with resumable():
        result: ComparisonResult = run_flow(flow, parameters | {"seeds": seeds, "name": name})
    print(f"\n{result.markdown}\npage   {display_path(result.page)}")
    print_links(result.links, ", where + expands the comparison's runs")
    if result.failed:
        raise typer.Exit(INCOMPLETE)


@app.command()
def retrain(
    config: ConfigPath,
    overrides: Overrides = None,
    path: Annotated[
        str | None,
        typer.Option("--path", metavar="FILE", help="Parquet file to add to data.source."),
    ] = None,
    start: Annotated[
        Literal["scratch", "champion"],
        typer.Option(help="Random weights on all data, or the champion's weights on new data."),
    ] = "scratch",
) -> None:
    """Train on new data; promote the model if it is better.

    Does nothing if the champion was trained on all of the source. Re-run the same command to
    resume.
    """
    values = merge_overrides({}, overrides or [])
    if problems := run_preflight(config, values, starting=True).problems:
        raise ConfigError(*problems)
    prepare(load_config(config, values).run.root)
    from flows.retrain import check_up_to_date
    from flows.retrain import retrain as flow
    from flows.runtime.local_run import run_flow

    parameters: Any = {"config": config, "overrides": values, "path": path, "start": start}
    with resumable():
        # Starting Prefect's API takes longer than finding out that there is nothing to do.
        result = check_up_to_date(**parameters) or run_flow(flow, parameters)
    print(f"\n{result.name}: " + ("nothing to do" if result.outcome is None else "retrained"))
    width = max(len(name) for name, _ in result.lines)
    for name, text in result.lines:
        print(f"  {name:<{width}}  {text}")
    print_links(result.links)


@app.command()
def import_nanogpt(
    path: Annotated[Path, typer.Argument(metavar="FILE.py", help="nanoGPT config file.")],
    data: Annotated[
        str, typer.Option("--data", metavar="PATH", help="Parquet to train on.")
    ] = "data/fineweb.parquet",
    gpu: Gpu = "auto",
) -> None:
    """Convert a nanoGPT config file to TOML.

    The file is parsed, never executed. The preflight report goes to standard error.
    """
    from rich.console import Console

    from gpt.exchange.nanogpt import convert_nanogpt
    from gpt.hardware.target_gpu import find_target_gpu
    from gpt.preflight.render import print_report

    imported = convert_nanogpt(path, data)
    print(imported.to_toml(), end="", flush=True)
    report = run_preflight_on_values(str(path), imported.values, find_target_gpu(gpu))
    print_report(report, Console(stderr=True, highlight=False))
    if report.blocked:
        raise typer.Exit(USER_ERROR)
