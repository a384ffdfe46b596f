"""The command line: parse, call, print. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt.config import RunConfig, load_config, merged, read_toml
from gpt.errors import ConfigError, GPTError
from gpt.training.schedule import peak_learning_rates

if TYPE_CHECKING:
    from flows.pretrain import Outcome

CANNOT = 2
"""Exit code for what the user can mend, as a config that cannot work."""
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
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _pretrained(config: str, laid_over: Mapping[str, Any], fresh: bool) -> Outcome:
    """Run the flow. A config that cannot work is told at once, then recorded as a Failed run."""
    problem = None
    try:
        load_config(config, laid_over)
    except ConfigError as error:
        problem = error
        print(error, file=sys.stderr, flush=True)  # now; Prefect takes seconds to start

    from flows import environment

    environment.prepare(_root(config, laid_over))
    environment.start_api()
    from flows.pretrain import pretrain

    try:
        return pretrain(config, dict(laid_over), fresh)
    except ConfigError:
        if problem is None:
            raise
        sys.exit(CANNOT)  # told above


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
  model  {_short(outcome.model)}
look at it in Prefect, then in MLflow:
  {outcome.look_prefect}
  {outcome.look_mlflow}"""
    )


def _short(path: Path) -> str:
    """Relative where it lies below this folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


@app.command()
def validate(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="TOML configs.")],
    overrides: Overrides = None,
) -> None:
    """Check configs and say what they come to; reads and starts nothing."""
    laid_over = merged({}, overrides or [])
    failed = False
    for path in configs:
        try:
            print(summary(path, load_config(path, laid_over)))
        except ConfigError as error:
            failed = True
            print(f"{path}: {error}" if len(configs) > 1 else error, file=sys.stderr)
    if failed:
        raise typer.Exit(CANNOT)


def summary(path: str, config: RunConfig) -> str:
    """A config that is right, in a few lines."""
    model, training, schedule = config.model, config.training, config.schedule
    optimizer, tokens = config.optimizer, config.tokens_per_step
    rate = peak_learning_rates(config).matrices
    rows = {
        "run": f"{config.run.name}, under {config.run.root}",
        "model": f"{model.architecture}, {model.n_layer} layers, {model.n_head} heads, "
        f"width {model.n_embd}, context {model.block_size:,} tokens",
        "step": f"{training.batch_size} x {training.grad_acc} sequences = {tokens:,} tokens",
        "training": f"{training.max_steps:,} steps = {training.max_steps * tokens:,} tokens",
        "optimizer": f"{optimizer.name}, learning rate {rate:.2g}, "
        f"{schedule.name} after {schedule.warmup_steps:,} steps of warm-up",
        "data": ", ".join(config.data.source),
    }
    return f"{path}: good\n" + "\n".join(f"  {name:<10} {text}" for name, text in rows.items())


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
