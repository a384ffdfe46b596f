"""The evaluation report of one model: held-out loss, benchmarks, and sample texts."""

from gpt.artifacts import DatasetManifest, EvaluationReport, Sample
from gpt.config.schema import RunConfig
from gpt.errors import BenchmarkError, Problem
from gpt.evaluation.benchmark_files import read_hellaswag, read_lambada
from gpt.evaluation.benchmarks import evaluate_hellaswag, evaluate_lambada
from gpt.evaluation.heldout import evaluate_heldout
from gpt.evaluation.progress import EvaluationProgress, ProgressGenerator
from gpt.model.base import GPT
from gpt.model.generate import SamplingParams, generate


def evaluate_model(
    model: GPT, config: RunConfig, dataset: DatasetManifest, step: int
) -> ProgressGenerator[EvaluationReport]:
    """Evaluate a model as `config.evaluation` sets; yields progress after each batch.

    The model must be in evaluation mode; `step` is the optimizer step it was saved at. Loss and
    benchmarks are computed in `training.dtype`. Raises `BenchmarkError` for a file that cannot be
    used, and `OutOfMemoryError`.
    """
    settings, dtype = config.evaluation, config.training.dtype
    heldout = yield from evaluate_heldout(model, config, dataset)
    arguments = (settings.batch_size, dtype, settings.benchmark_examples)
    hellaswag = lambada = None
    if settings.hellaswag:
        hellaswag = yield from evaluate_hellaswag(model, settings.hellaswag, *arguments)
    if settings.lambada:
        lambada = yield from evaluate_lambada(model, settings.lambada, *arguments)
    samples = []
    sampling = SamplingParams(settings.sample_tokens)  # the same seed for every config
    for prompt in settings.prompts:
        samples.append(Sample(prompt=prompt, text=generate(model, prompt, sampling)))
        yield EvaluationProgress("samples", len(samples), len(settings.prompts))
    return EvaluationReport(
        step=step, samples=tuple(samples), hellaswag=hellaswag, lambada=lambada, **vars(heldout)
    )


def check_benchmarks(config: RunConfig) -> None:
    """Read one example of each configured benchmark, so that a wrong file fails before training.

    Raises `BenchmarkError` with every problem.
    """
    problems: list[Problem] = []
    for path, read in (
        (config.evaluation.hellaswag, read_hellaswag),
        (config.evaluation.lambada, read_lambada),
    ):
        try:
            if path:
                read(path, 1)
        except BenchmarkError as error:
            problems += error.problems
    if problems:
        raise BenchmarkError(*problems)
