"""Fit the throughput model of `gpt/preflight/throughput.py` to published measurements.

    python tests/benchmarks/fit_throughput.py           # print the fit beside what is stored
    python tests/benchmarks/fit_throughput.py --write   # and store it

Least squares on the logarithm of tokens per second with a Gaussian prior on every value, so that a
value without measurements keeps its prior. Runs of one GPU with FlashAttention in a plain compiled
loop count most; others have a factor of their own, which the preflight does not use. The error is
the root mean square over runs that the fit left out: one run at a time, and all runs of a card.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gpt.hardware.gpus import GPUS, read_rows  # noqa: E402
from gpt.preflight.throughput import Shape, load_efficiency, step_seconds  # noqa: E402

EFFICIENCY = ROOT / "gpt" / "hardware" / "efficiency.toml"
# Mean and standard deviation: of the exponent itself, of the logarithm of the others.
PRIOR = {
    "products": (0.7, 0.5),
    "peak_exponent": (0.25, 0.15),
    "full_rate": (0.85, 0.15),  # bare products: GeForce at 1.0 of the peak, A100 .83, H100 .78
    "turing": (0.8, 0.3),  # bare products: V100 and T4 at .74 and .65 of the peak, A100 at .83
    "ampere": (1.0, 0.3),
    "ada": (1.0, 0.3),
    "hopper": (1.0, 0.3),
    "blackwell": (1.0, 0.3),
    "memory": (0.8, 0.25),
    "width": (100.0, 0.7),
    "launch_seconds": (60e-6, 0.5),
    # Not used by the preflight: bytes per score of materialized attention, and factors of loops.
    "scores": (30.0, 0.5),
    "llm.c": (1.07, 0.15),
    "llm-foundry": (0.85, 0.2),
    "several": (0.95, 0.05),
}
RUN_SIGMA, OTHER_SIGMA = 0.1, 0.2
"""Of a run like ours, and of others."""
HEADER = """\
# Efficiencies of the throughput model (gpt/preflight/throughput.py), fitted to measurements.csv and
# written by `python tests/benchmarks/fit_throughput.py --write`, which prints every run beside its
# prediction. run_error and card_error: root mean square relative error for a run that the fit left
# out, and for all runs of a card where another of its compute capability was measured.
"""

Row = dict[str, str]
BY_KEY = {gpu.key: gpu for gpu in GPUS}


def is_like_ours(row: Row) -> bool:
    return row["loop"] == "plain" and row["flash"] == "1" and row["gpus"] == "1"


def describe_row(row: Row) -> Shape:
    sizes = {key: int(row[key]) for key in Shape.__annotations__ if key in row}
    tables = 1 if row["architecture"] == "gpt2" else 2
    width = sizes["n_embd"]
    return Shape(
        **sizes,
        parameters=12 * sizes["n_layer"] * width**2 + tables * sizes["vocab_size"] * width,
        is_muon=row["optimizer"] == "muon",
    )


def predict(row: Row, values: dict[str, float]) -> float:
    """Return the tokens per second of one GPU."""
    shape, gpu = describe_row(row), BY_KEY[row["gpu"]]
    assert gpu.tflops is not None
    tokens = shape.grad_acc * shape.micro_batch_tokens
    seconds = step_seconds(shape, gpu, gpu.tflops, values)
    if row["flash"] == "0":
        scores = tokens * shape.n_layer * shape.n_head * shape.block_size
        seconds += scores * values["scores"] / (gpu.bandwidth_gbs * 1e9 * values["memory"])
    rate = tokens / seconds
    rate *= values[row["loop"]] if row["loop"] != "plain" else 1
    return rate * (values["several"] if row["gpus"] != "1" else 1)


def log_error(row: Row, values: dict[str, float]) -> float:
    return math.log(predict(row, values) / float(row["tokens_per_second"]))


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """Return the values with the highest posterior probability, by Gauss-Newton."""
    scale = {name: (lambda v: v) if name == "peak_exponent" else math.log for name in PRIOR}
    mean = np.array([scale[name](value) for name, (value, _) in PRIOR.items()])
    deviation = np.array([sigma for _, sigma in PRIOR.values()])

    def decode(point: np.ndarray) -> dict[str, float]:
        pairs = zip(PRIOR, map(float, point), strict=True)
        return {name: x if name == "peak_exponent" else math.exp(x) for name, x in pairs}

    def residuals(point: np.ndarray) -> np.ndarray:
        values = decode(point)
        runs = [
            log_error(r, values) / (RUN_SIGMA if is_like_ours(r) else OTHER_SIGMA) for r in rows
        ]
        return np.concatenate([runs, (point - mean) / deviation])

    point = mean
    for _ in range(20):
        now = residuals(point)
        steps = 1e-5 * np.eye(len(point))
        jacobian = np.stack([(residuals(point + step) - now) / 1e-5 for step in steps], axis=1)
        change = np.linalg.lstsq(jacobian, -now, rcond=None)[0]
        point = point + change
        if np.abs(change).max() < 1e-7:
            break
    return decode(point)


def root_mean_square(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def evaluate(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return each run's log error: without that run, and without all runs of its card."""
    without_card = {
        key: fit([row for row in rows if row["gpu"] != key]) for key in {r["gpu"] for r in rows}
    }
    return [
        (
            log_error(row, fit([other for other in rows if other is not row])),
            log_error(row, without_card[row["gpu"]]),
        )
        for row in rows
    ]


def is_alone(row: Row) -> bool:
    """Return whether no other card of its compute capability was measured. The preflight doubles
    the error of such cards."""
    capability = BY_KEY[row["gpu"]].compute_capability
    keys = {other["gpu"] for other in fitted_rows()} - {row["gpu"]}
    return all(BY_KEY[key].compute_capability != capability for key in keys)


def fitted_rows() -> list[Row]:
    return [row for row in read_rows("measurements.csv") if not row["left_out"]]


def fit_all() -> tuple[dict[str, float], list[tuple[float, float]]]:
    """Return what is stored, and each run's errors."""
    rows = fitted_rows()
    values, errors = fit(rows), evaluate(rows)
    values["run_error"] = math.expm1(root_mean_square([run for run, _ in errors]))
    others = [card for row, (_, card) in zip(rows, errors, strict=True) if not is_alone(row)]
    values["card_error"] = math.expm1(root_mean_square(others))
    return {name: float(f"{value:.4g}") for name, value in values.items()}, errors


def main() -> None:
    values, errors = fit_all()
    stored = load_efficiency() if EFFICIENCY.exists() else {}
    for name, value in values.items():
        print(f"{name:16} {value:<10g} stored {stored.get(name, math.nan):g}")
    heads = ("measured", "fitted", "error", "run left out", "card left out")
    print("\n{:16} {:12} {:>9}{:>11}{:>11}{:>9}{:>14}{:>15}".format("GPU", "loop", "shape", *heads))
    for row, left_out in zip(fitted_rows(), errors, strict=True):
        measured, shape = float(row["tokens_per_second"]), f"{row['n_layer']}/{row['n_embd']}"
        ratios = (log_error(row, values), *left_out)
        run, card, both = (f"{math.expm1(ratio):+.0%}" for ratio in (*ratios[1:], ratios[0]))
        print(
            f"{row['gpu']:16} {row['loop']:12} {shape:>9}{measured:11,.0f}"
            f"{predict(row, values):11,.0f}{both:>9}{run:>14}{card:>15}"
        )
    for row in read_rows("measurements.csv"):
        if row["left_out"]:
            error = math.expm1(log_error(row, values))
            print(f"{row['gpu']:16} not fitted, {error:+.0%}: {row['left_out']}; {row['source']}")
    print(f"\nleave-one-out error: {values['run_error']:.1%} for a run,", end=" ")
    print(f"{values['card_error']:.1%} for a card without any,", end=" ")
    alone = [card for row, (_, card) in zip(fitted_rows(), errors, strict=True) if is_alone(row)]
    print(f"{math.expm1(root_mean_square(alone)):.1%} if none of its compute capability has any")
    if "--write" in sys.argv:
        lines = [f'"{name}" = {value!r}' for name, value in values.items()]
        EFFICIENCY.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
