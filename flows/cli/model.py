"""The commands about a trained model: generate, evaluate, export, import-hf."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import Overrides
from gpt.config.loading import merge_overrides

app = typer.Typer(rich_markup_mode=None)

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
    from flows.cli.model_choice import find_model
    from gpt.hardware.device import pick_device
    from gpt.model.generate import SamplingParams, stream_text
    from gpt.model.io import load_model

    sampling = SamplingParams(max_tokens, temperature, top_k, top_p, seed)
    network = load_model(find_model(model, root), pick_device(device))
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
    from flows.runtime import environment

    environment.prepare(root)
    from flows.cli.model_choice import evaluation_config, find_model, read_model_facts
    from gpt.evaluation.report import check_benchmarks
    from gpt.exchange.model_card import render_evaluation
    from tasks.display import print_to_stderr
    from tasks.evaluate import evaluate_saved_model, render_samples
    from tasks.tokenize_parquet import find_or_tokenize

    folder = find_model(model, root)
    facts = read_model_facts(folder)
    asked = evaluation_config(folder, facts, config, merge_overrides({}, overrides or []))
    check_benchmarks(asked)
    with print_to_stderr(as_json):
        same_data = facts.config and facts.config.data == asked.data
        dataset = (facts.dataset if same_data else None) or find_or_tokenize(asked)
        report = evaluate_saved_model(folder, asked, dataset, facts.step or 0)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print(f"\n{render_evaluation(report)}\n\n{render_samples(report)}", end="")


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODELS)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.")],
    root: Root = Path("runs"),
) -> None:
    """Write a model as a directory that Hugging Face's transformers loads, with a model card."""
    from flows.cli.model_choice import find_model, read_model_facts
    from gpt.exchange.huggingface import export_huggingface

    folder = find_model(model, root)
    export_huggingface(folder, directory, read_model_facts(folder))
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
