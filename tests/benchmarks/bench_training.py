"""Compare the training recipes with a plain GPT-2 loop on the same data and tokens per step.

    python tests/benchmarks/bench_training.py --source corpus-*.parquet [--quick] [--json FILE]

On a host that only trains, pass --dataset FOLDER instead of --source.

Every run is its own process. Prints tokens/s, peak memory and validation losses at equal tokens and
at equal seconds, and draws the curves into --picture. Training seconds exclude all validations and
the compiling before the first step. `--memory-gb 12` makes a large GPU behave like a 12 GB card, in
which a smaller micro-batch than the configured one may be used; it is printed.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from flows.runtime.environment import COMPUTE
from gpt.config.loading import build_config

ROOT = Path(__file__).parents[2]
PLAIN, GPT2, NANOCHAT = "plain", "gpt2", "nanochat"

# The rules for learning rates were not measured below the sizes in configs/ (here: two thousand
# tokens per step, hundreds of steps). GPT-2: nanoGPT advises more than 6e-4 for small networks.
# nanochat: the middle of a flat optimum among six settings at 100 steps (docs/benchmarks.md).
CLASSIC_SMALL = {"learning_rate": 2e-3}
CLASSIC = {"learning_rate": 6e-4}
NANOCHAT_SMALL = {
    "learning_rate": 0.035,
    "embedding_learning_rate": 0.4,
    "head_learning_rate": 0.012,
}


def main():
    options = arguments()
    if options.merge:
        report([r for path in options.merge for r in json.loads(Path(path).read_text())], options)
        return
    if options.worker:
        measure_one(json.loads(options.worker))
        return
    if options.quick:
        options.steps, options.seeds = [60], 1
    results = []
    with tempfile.TemporaryDirectory() as folder:
        dataset_root = options.root or folder
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for recipe in options.recipes:
                for steps in options.steps:
                    job = job_of(options, recipe, steps, seed, dataset_root)
                    results.append(run_job(job))
                    print_result(results[-1])
    report(results, options)


def report(results, options):
    print("\n" + table(results))
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))
    if options.picture:
        draw(results, options.picture)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", nargs="+", default=[], help="Parquet files with text")
    parser.add_argument("--dataset", help="folder of a tokenized dataset, instead of --source")
    parser.add_argument("--recipes", nargs="+", default=[PLAIN, GPT2, NANOCHAT])
    parser.add_argument("--steps", nargs="+", type=int, default=[400])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--n-embd", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--grad-acc", type=int, default=1)
    parser.add_argument("--interval", type=int, default=50, help="steps between validations")
    parser.add_argument("--validation-tokens", type=int, default=65_536)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-gb", type=float, help="limit of the GPU memory")
    parser.add_argument(
        "--seconds", type=float, help="stop each run after this many training seconds"
    )
    parser.add_argument("--set", action="append", default=[], help="override for gpt2 and nanochat")
    parser.add_argument("--root", help="folder that keeps the tokenized data between calls")
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps: minutes")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--merge", nargs="+", metavar="FILE", help="print earlier results again")
    parser.add_argument("--picture", metavar="FILE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.source or options.dataset or options.merge or options.worker):
        parser.error("give --source PARQUET or --dataset FOLDER")
    return options


def job_of(options, recipe, steps, seed, root):
    small = options.n_embd < 256
    raw = {
        "run": {"name": recipe, "root": root},
        "model": {
            "architecture": NANOCHAT if recipe == NANOCHAT else GPT2,
            "n_layer": options.n_layer,
            "n_head": options.n_head,
            "n_embd": options.n_embd,
            "block_size": options.block_size,
        },
        "data": {"source": options.source or ["unused"], "validation_fraction": 0.02},
        "training": {
            "batch_size": options.batch_size,
            "grad_acc": options.grad_acc,
            "max_steps": steps,
            "seed": seed,
            "checkpoint_interval": steps,
        },
        "evaluation": {
            "interval": options.interval,
            "tokens": options.validation_tokens,
            "batch_size": options.batch_size,
        },
        "hardware": {"device": options.device},
    }
    if recipe == NANOCHAT:
        raw["optimizer"] = {"name": "muon", "weight_decay": 0.05, "grad_clip": 0.0}
        raw["optimizer"] |= NANOCHAT_SMALL if small else {}
        raw["schedule"] = {"name": "linear", "min_learning_rate_ratio": 0.0}
    else:
        raw["optimizer"] = CLASSIC_SMALL if small else CLASSIC
        raw["schedule"] = {"warmup_steps": min(100, steps // 10)}
    return {
        "recipe": recipe,
        "steps": steps,
        "seed": seed,
        "config": raw,
        "overrides": [] if recipe == PLAIN else options.set,
        "dataset": options.dataset,
        "memory_gb": options.memory_gb,
        "seconds": options.seconds,
    }


def run_job(job):
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    # The plain loop runs in torch's default environment.
    settings = {} if job["recipe"] == PLAIN else COMPUTE
    done = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=settings | os.environ,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {**described(job), "error": f"exit code {done.returncode}", "points": []}
    return {**described(job), **json.loads(lines[-1])}


def described(job):
    return {"recipe": job["recipe"], "steps": job["steps"], "seed": job["seed"]}


def measure_one(job):
    """Run one recipe in a worker process and print one line of JSON."""
    import torch

    from gpt.config.loading import merge_overrides
    from gpt.hardware.device import peak_memory_bytes

    config = build_config(merge_overrides(job["config"], job["overrides"]))
    dataset = dataset_of(config, job["dataset"])
    device = torch.device(config.hardware.device)
    if device.type == "cuda" and job["memory_gb"]:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(job["memory_gb"] * 1e9 / whole)
    begin = peak_memory_bytes(device)
    try:
        runs = plain_points if job["recipe"] == PLAIN else our_points
        points = list(limited(runs(config, dataset), job["seconds"]))
        error = None
    except torch.OutOfMemoryError as failure:
        points, error = [], str(failure).splitlines()[0]
    print(
        json.dumps(
            {
                "points": points,
                "tokens_per_step": config.tokens_per_step,
                "memory_before_bytes": begin,
                "peak_memory_bytes": peak_memory_bytes(device),
                "error": error,
            }
        )
    )


def dataset_of(config, folder):
    """Tokenize, unless a folder is given: a host that only trains has no polars."""
    if folder:
        from gpt.data.shards import read_manifest

        return read_manifest(Path(folder))
    from gpt.data.tokenize.pipeline import tokenize_corpus

    tokenizing = tokenize_corpus(config)
    while True:
        try:
            next(tokenizing)
        except StopIteration as stop:
            return stop.value


def limited(points, seconds):
    for point in points:
        yield point
        if seconds and point["seconds"] >= seconds:
            return


def plain_points(config, dataset):
    from plain_loop import train_plain

    rate, warmup = config.optimizer.learning_rate, config.schedule.warmup_steps
    for step, seconds, loss, validation in train_plain(config, dataset, rate, warmup):
        point = {"step": step, "seconds": seconds, "loss": loss, "validation": validation}
        yield point | {"batch_size": config.training.batch_size}


def our_points(config, dataset):
    from gpt.training.loop import train

    seconds, point = 0.0, None
    with tempfile.TemporaryDirectory() as folder:
        for record in train(config, dataset, Path(folder)):
            if record.validation and point:  # its record comes after the step's
                point["validation"] = record.validation.loss
            if record.loss is None:
                continue
            if point:
                yield point
            seconds += config.tokens_per_step / record.tokens_per_second
            point = {
                "step": record.step,
                "seconds": seconds,
                "loss": record.loss,
                "validation": None,
                "mfu": record.mfu,
                "batch_size": record.batch_size,
            }
        yield point


# --- report -------------------------------------------------------------------------------------


def tokens_per_second(result):
    """Return the median over the steps, without the first ten (compiling, warm-up)."""
    seconds = [point["seconds"] for point in result["points"]]
    steps = [b - a for a, b in itertools.pairwise(seconds[9:])]
    return result["tokens_per_step"] / statistics.median(steps) if steps else float("nan")


def final_validation(result):
    held = [p["validation"] for p in result["points"] if p["validation"] is not None]
    return held[-1] if held else float("nan")


def print_result(result):
    if result.get("error"):
        print(f"{result['recipe']:>9} seed {result['seed']}: {result['error']}", flush=True)
        return
    mfu = result["points"][-1].get("mfu")
    print(
        f"{result['recipe']:>9} {result['steps']:>5} steps seed {result['seed']}  "
        f"{tokens_per_second(result):>9,.0f} tokens/s  "
        f"batch {result['points'][-1]['batch_size']:>3}  "
        f"{result['peak_memory_bytes'] / 1e6:>7,.0f} MB  "
        f"{result['points'][-1]['seconds']:>6,.0f} s  "
        f"validation {final_validation(result):.4f}  mfu {f'{mfu:.1%}' if mfu else 'n/a'}",
        flush=True,
    )


def table(results):
    """Format means over seeds and their ratios to the plain loop with the most steps."""
    groups = {}
    for result in results:
        if result["points"]:
            groups.setdefault((result["recipe"], result["steps"]), []).append(result)
    plain = max((key for key in groups if key[0] == PLAIN), key=lambda key: key[1], default=None)
    rows = [
        "| recipe | steps | micro-batch | tokens/s | peak memory, MB | seconds | validation loss "
        "| seconds to the plain loop's last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = means(groups[plain]) if plain else None
    for (recipe, steps), runs in groups.items():
        mine = means(runs)
        reached = [seconds_to(run, base["validation"]) for run in runs] if base else []
        hit = [s for s in reached if s is not None]
        when = f"{statistics.fmean(hit):,.0f} ({len(hit)}/{len(runs)})" if hit else "not reached"

        def against(key, mine=mine):
            return f" ({mine[key] / base[key]:.2f}x)" if base else ""

        rows.append(
            f"| {recipe} | {steps} | {min(run['points'][-1]['batch_size'] for run in runs)} "
            f"| {mine['speed']:,.0f}{against('speed')} "
            f"| {mine['memory'] / 1e6:,.0f}{against('memory')} "
            f"| {mine['seconds']:,.0f}{against('seconds')} | {mine['validation']:.4f} | {when} |"
        )
    return "\n".join(rows)


def means(runs):
    return {
        "speed": statistics.fmean(tokens_per_second(run) for run in runs),
        "memory": statistics.fmean(run["peak_memory_bytes"] for run in runs),
        "seconds": statistics.fmean(run["points"][-1]["seconds"] for run in runs),
        "validation": statistics.fmean(final_validation(run) for run in runs),
    }


def seconds_to(result, loss):
    for point in result["points"]:
        if point["validation"] is not None and point["validation"] <= loss:
            return point["seconds"]
    return None


def draw(results, path):
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    colours = {PLAIN: "tab:grey", GPT2: "tab:blue", NANOCHAT: "tab:orange"}
    for result in results:
        held = [p for p in result["points"] if p["validation"] is not None]
        label = f"{result['recipe']}, {result['steps']} steps" if result["seed"] == 0 else None
        look = {"color": colours.get(result["recipe"]), "label": label, "alpha": 0.8}
        losses = [p["validation"] for p in held]
        axes[0].plot([p["step"] * result["tokens_per_step"] / 1e6 for p in held], losses, **look)
        axes[1].plot([p["seconds"] for p in held], losses, **look)
    axes[0].set(xlabel="tokens, millions", ylabel="validation loss, nats")
    axes[1].set(xlabel="training seconds")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
