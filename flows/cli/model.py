"""The commands about a trained model: generate, evaluate, export, import-hf."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import Json, Overrides, Root
from flows.runtime.environment import prepare
from gpt.config.loading import merge_overrides

app = typer.Typer(rich_markup_mode=None)

MODEL = (
    "Registered model, e.g. models:/gpt@champion or models:/gpt/3, a run's name or folder, a "
    "checkpoint, or a folder from import-hf."
)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")] = "",
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help=MODEL)
    ] = "models:/gpt@champion",
    max_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from the top k tokens; 0: from all.")] = 50,
    top_p: Annotated[float, typer.Option(help="Sample from this much of the probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 1337,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    root: Root = Path("runs"),
) -> None:
    """Generate text from a prompt."""
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
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    config: Annotated[
        str | None,
        typer.Option("--config", help="Config for data and evaluation (default: the run's)."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
    root: Root = Path("runs"),
) -> None:
    """Evaluate a model: validation loss, benchmarks, samples.

    Benchmarks need their files: --set evaluation.hellaswag=FILE.parquet, evaluation.lambada.
    """
    prepare(root)
    from flows.cli.model_choice import evaluation_config, find_model, read_model_facts
    from gpt.evaluation.report import check_benchmarks
    from gpt.exchange.model_card import render_evaluation
    from tasks.display import console
    from tasks.evaluate import evaluate_saved_model, render_samples
    from tasks.tokenize_parquet import find_or_tokenize

    folder = find_model(model, root)
    facts = read_model_facts(folder)
    target = evaluation_config(folder, facts, config, merge_overrides({}, overrides or []))
    check_benchmarks(target)
    console.stderr = as_json  # standard output is for the JSON alone
    same_data = facts.config and facts.config.data == target.data
    dataset = (facts.dataset if same_data else None) or find_or_tokenize(target)
    report = evaluate_saved_model(folder, target, dataset, facts.step or 0)
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        print(f"\n{render_evaluation(report)}\n\n{render_samples(report)}", end="")


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New directory to write.")],
    root: Root = Path("runs"),
) -> None:
    """Export a model to the Hugging Face format."""
    from flows.cli.model_choice import find_model, read_model_facts
    from gpt.exchange.huggingface import export_huggingface

    folder = find_model(model, root)
    export_huggingface(folder, directory, read_model_facts(folder))
    print(f"{directory}: written; fill in the license in its README.md")


@app.command()
def import_hf(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="GPT-2 saved by transformers.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder to write.")],
) -> None:
    """Import a GPT-2 from the Hugging Face format."""
    from gpt.exchange.huggingface import import_huggingface

    model = import_huggingface(directory, folder)
    sizes = f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}"
    print(f"{folder}: GPT-2 with {sizes}, {model.block_size:,} tokens of context")
