"""The report on one model: held-out loss, the benchmarks asked for, and what it writes."""

from __future__ import annotations

from gpt.artifacts import DatasetManifest, EvaluationReport, Sample
from gpt.config.schema import RunConfig
from gpt.errors import BenchmarkError, Problem
from gpt.evaluation.benchmark_files import read_hellaswag, read_lambada
from gpt.evaluation.benchmarks import hellaswag, lambada
from gpt.evaluation.heldout import evaluate_heldout
from gpt.evaluation.progress import EvaluationProgress, ProgressGenerator
from gpt.model.base import GPT
from gpt.model.generate import SamplingParams, generate


def evaluate_model(
    model: GPT, config: RunConfig, dataset: DatasetManifest, step: int
) -> ProgressGenerator[EvaluationReport]:
    """As `config.evaluation` asks, of a model in its evaluation mode after `step` steps.

    Validation slice and benchmarks are scored in `training.dtype`'s precision; yields after every
    batch. Raises `BenchmarkError` for a file that cannot be scored, `OutOfMemoryError`.
    """
    asked, dtype = config.evaluation, config.training.dtype
    heldout = yield from evaluate_heldout(model, config, dataset)
    sizes = (asked.batch_size, dtype, asked.benchmark_examples)
    swag = (yield from hellaswag(model, asked.hellaswag, *sizes)) if asked.hellaswag else None
    last = (yield from lambada(model, asked.lambada, *sizes)) if asked.lambada else None
    samples = []
    sampling = SamplingParams(asked.sample_tokens)  # one seed for every config
    for prompt in asked.prompts:
        samples.append(Sample(prompt=prompt, text=generate(model, prompt, sampling)))
        yield EvaluationProgress("samples", len(samples), len(asked.prompts))
    return EvaluationReport(
        step=step, samples=tuple(samples), hellaswag=swag, lambada=last, **vars(heldout)
    )


def check_benchmarks(config: RunConfig) -> None:
    """Read one example of each benchmark that will be asked for, so that a file which cannot be
    used is told before the night. Raises `BenchmarkError` with every problem."""
    problems: list[Problem] = []
    for path, read in (
        (config.evaluation.hellaswag, read_hellaswag),
        (config.evaluation.lambada, read_lambada),
    ):
        try:
            if path:
                next(iter(read(path, 1)), None)
        except BenchmarkError as error:
            problems += error.problems
    if problems:
        raise BenchmarkError(*problems)
