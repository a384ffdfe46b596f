"""The command line: parse, call, print. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt.config import load_config, merged, read_toml
from gpt.errors import ConfigError, GPTError

if TYPE_CHECKING:
    from flows.compare import Compared
    from flows.contest import Entrant
    from flows.outcome import Outcome
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


def main() -> None:
    """Entry of the console script. A message alone on standard error for what the user can mend."""
    try:
        app()
    except GPTError as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT)


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
    try:
        print_outcome(_pretrained(config, merged({}, overrides or []), fresh))
    except KeyboardInterrupt:  # before the flow could take it
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _pretrained(config: str, laid_over: Mapping[str, Any], fresh: bool) -> Outcome:
    """Run the flow, unless the run is finished already. A config that cannot work is told at once,
    then recorded as a Failed run."""
    from gpt.preflight.report import examine

    problems = examine(config, laid_over, starting=True).problems
    if problems:  # told now; Prefect takes seconds to start
        print(ConfigError(*problems), file=sys.stderr, flush=True)
    elif not fresh and (finished := _finished(config, laid_over)):
        return finished

    from flows import environment

    environment.prepare(_root(config, laid_over))
    from flows.session import run_pretrain

    try:
        return run_pretrain(config, dict(laid_over), fresh)
    except ConfigError:
        if not problems:
            raise
        sys.exit(CANNOT)  # told above


def _finished(config: str, laid_over: Mapping[str, Any]) -> Outcome | None:
    from flows.outcome import finished_outcome

    outcome = finished_outcome(config, laid_over)
    if outcome:
        print(
            f"already finished at step {outcome.report.step} in {_short(outcome.folder)}; "
            "start anew with --fresh or another run.name"
        )
    return outcome


def _root(config: str, overrides: Mapping[str, Any]) -> Path:
    """`run.root` as far as it can be known, to record a config that cannot work as well."""
    try:
        raw = merged(read_toml(Path(config)), overrides)
        return Path(raw["run"]["root"])
    except (ConfigError, KeyError, TypeError):
        return Path("runs")


def print_outcome(outcome: Outcome) -> None:
    """The last lines of a run."""
    report = outcome.report
    print(
        f"""
{outcome.name}: validation loss {report.loss:.4f}, {report.bits_per_byte:.4f} bits per byte \
after {report.step:,} steps, {outcome.tokens_seen:,} tokens
  run    {_short(outcome.folder)}
  model  {_short(outcome.model)}{_as_registered(outcome)}
look at it in Prefect, then in MLflow:
  {outcome.look_prefect}
  {outcome.look_mlflow}"""
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
    from flows.contest import entrants_of

    laid_over = merged({}, overrides or [])
    entrants = entrants_of(configs, laid_over, tokens, seeds)
    if _all_have_problems(entrants):
        raise typer.Exit(CANNOT)
    from flows import environment

    environment.prepare(next(entrant.config.run.root for entrant in entrants if entrant.config))
    from flows.session import run_compare

    try:
        compared = run_compare(configs, dict(laid_over), tokens, seeds, name)
    except KeyboardInterrupt:  # before the flow could take it
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    _print_compared(compared)
    if compared.failed:
        raise typer.Exit(FAILED)


def _all_have_problems(entrants: Sequence[Entrant]) -> bool:
    """What the preflight finds is told before anything is started."""
    from gpt.preflight.report import examine

    blocked = 0
    for entrant in entrants:
        problems = examine(entrant.path, entrant.overrides, starting=True).problems
        if problems:
            print(f"{entrant.name}: {ConfigError(*problems)}", file=sys.stderr, flush=True)
            blocked += 1
    return blocked == len(entrants)


def _print_compared(compared: Compared) -> None:
    print(
        f"""
{compared.markdown}
page   {_short(compared.page)}
look at it in Prefect, then in MLflow:
  {compared.look_prefect}
  {compared.look_mlflow}"""
    )


@app.command()
def validate(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="TOML configs.")],
    overrides: Overrides = None,
    gpu: Gpu = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what configs come to and whether they can work; reads no data and starts nothing."""
    from gpt.preflight.report import examine

    laid_over = merged({}, overrides or [])
    reports = [examine(path, laid_over, gpu) for path in configs]
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

    from gpt.preflight.pages import print_comparison, print_report

    if len(reports) > 1:
        print_comparison(reports, Console(highlight=False, width=_width()))
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

    from gpt.exchange.nanogpt import read_nanogpt
    from gpt.preflight.pages import print_report
    from gpt.preflight.report import examine_values
    from gpt.preflight.target import find_target

    imported = read_nanogpt(path, data)
    print(imported.toml(), end="")
    report = examine_values(str(path), imported.values, find_target(gpu))
    sys.stdout.flush()
    print_report(report, Console(stderr=True, highlight=False))
    if report.blocked:
        raise typer.Exit(CANNOT)


@app.command()
def tokenize(config: ConfigPath, overrides: Overrides = None) -> None:
    """Make the data set of a config, or find the one made before, and nothing else."""
    from flows import environment

    checked = load_config(config, merged({}, overrides or []))
    environment.prepare(checked.run.root)
    from tasks.tokenize_parquet import tokenized

    try:
        tokenized(checked)
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
    from flows import environment
    from gpt.training.run_folder import named_run_folder

    folder = named_run_folder(run, root)
    environment.prepare(root)
    from gpt.training.run_lock import run_lock
    from tasks.tracking import sync_run

    with run_lock(folder):
        sent = sync_run(folder, uri)
    print(f"{_short(folder.resolve())}: {sent}")


MODELS = (
    "A registered model, as models:/gpt@champion or models:/gpt/3, a run's name or folder, a "
    "checkpoint, or a folder that import-hf made."
)
Root = Annotated[Path, typer.Option("--root", help="Where runs lie (run.root).")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="How the text begins.")] = "",
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help=MODELS)
    ] = "models:/gpt@champion",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0: from all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Draw from so much of the probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 1337,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    root: Root = Path("runs"),
) -> None:
    """Let a model go on from a prompt; the text appears as it is written."""
    from flows.models import find_model
    from gpt.model.device import pick_device
    from gpt.model.generation import Sampling, stream_text
    from gpt.model.saved import load_saved

    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
    network = load_saved(find_model(model, root), pick_device(device))
    print(prompt, end="", flush=True)
    for piece in stream_text(network, prompt, sampling):
        print(piece, end="", flush=True)
    print()


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODELS)],
    config: Annotated[
        str | None, typer.Option("--config", help="Whose data and [evaluation]; else the run's.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    root: Root = Path("runs"),
) -> None:
    """Say how good a model is: validation loss, benchmarks whose files are named, samples.

    As --set evaluation.hellaswag=FILE.parquet --set evaluation.lambada=FILE.parquet.
    """
    from flows import environment

    environment.prepare(root)
    from flows.models import asked_of, facts_of, find_model
    from gpt.exchange.model_card import evaluation_section
    from tasks.console import quietly
    from tasks.evaluate import evaluated, samples_page
    from tasks.tokenize_parquet import tokenized

    folder = find_model(model, root)
    facts = facts_of(folder)
    asked = asked_of(folder, facts, config, merged({}, overrides or []))
    with quietly(as_json):
        same_data = facts.config and facts.config.data == asked.data
        dataset = (facts.dataset if same_data else None) or tokenized(asked)
        report = evaluated(folder, asked, dataset, facts.step or 0)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print(f"\n{evaluation_section(report)}\n\n{samples_page(report)}", end="")


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODELS)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.")],
    root: Root = Path("runs"),
) -> None:
    """Write a model as a directory that Hugging Face's transformers loads, with a model card."""
    from flows.models import facts_of, find_model
    from gpt.exchange.huggingface import export_huggingface

    folder = find_model(model, root)
    export_huggingface(folder, directory, facts_of(folder))
    print(f"{directory}: written; the licence in its README.md is yours to fill in")


@app.command()
def import_hf(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A GPT-2 that transformers saved.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder for it.")],
) -> None:
    """Bring in a GPT-2 from Hugging Face's format."""
    from gpt.exchange.huggingface import import_huggingface

    model = import_huggingface(directory, folder)
    sizes = f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}"
    print(f"{folder}: GPT-2 with {sizes}, {model.block_size:,} tokens of context")


@app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="A data set's folder.")],
    count: Annotated[int, typer.Option("--samples", help="Documents to show of each side.")] = 2,
) -> None:
    """Check a data set's shards, say what is in it, and show how some documents begin."""
    from gpt.data.shards import check, read_manifest
    from gpt.data.summary import describe, samples

    manifest = read_manifest(dataset.parent if dataset.is_file() else dataset)
    check(manifest)
    print(describe(manifest))
    for name, split in (("training", manifest.train), ("validation", manifest.validation)):
        for text in samples(manifest, split, count):
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
