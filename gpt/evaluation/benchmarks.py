"""HellaSwag and LAMBADA, scored as lm-evaluation-harness scores them (EleutherAI;
lm_eval/tasks/hellaswag and lm_eval/tasks/lambada/lambada_openai.yaml), without examples before.

Each is a generator that yields its progress after every batch; its value is the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from gpt.artifacts import HellaSwagResult, LambadaResult
from gpt.errors import BenchmarkError, Problem
from gpt.evaluation.benchmark_files import ENDINGS, HellaSwagExample, read_hellaswag, read_lambada
from gpt.evaluation.progress import ProgressGenerator
from gpt.evaluation.scoring import (
    Continuation,
    encode_continuation,
    fingerprint,
    score_continuations,
)
from gpt.model.base import GPT

# --- HellaSwag -----------------------------------------------------------------------------------


def hellaswag(
    model: GPT, path: str, batch_size: int, dtype: str, limit: int | None = None
) -> ProgressGenerator[HellaSwagResult]:
    """Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?",
    arXiv:1905.07830: which of four endings goes on from a context.

    The model's answer is the ending with the highest log-likelihood after "activity: context " and,
    normalised, with the highest log-likelihood a byte of the ending (the space before it not
    counted). Takes the first `limit` examples of the file. `batch_size` and `dtype` as in
    `continuations.score`, errors too; raises `BenchmarkError` for a file that cannot be used.
    """
    examples = list(read_hellaswag(path, limit))
    _refuse_nothing(path, examples)
    requests = [request for example in examples for request in build_hellaswag_requests(example)]
    scores = yield from score_continuations(model, requests, batch_size, dtype, "HellaSwag")
    plain, normalized = [], []
    for number, example in enumerate(examples):
        four = [each.log_likelihood for each in scores[number * ENDINGS : (number + 1) * ENDINGS]]
        sizes = [len(preprocess(ending).encode()) or 1 for ending in example.endings]
        plain.append(_place_of_largest(four) == example.label)
        each_byte = [likelihood / size for likelihood, size in zip(four, sizes, strict=True)]
        normalized.append(_place_of_largest(each_byte) == example.label)
    return HellaSwagResult(
        examples=len(examples),
        accuracy=sum(plain) / len(plain),
        accuracy_error=_error_of_share(plain),
        normalized_accuracy=sum(normalized) / len(normalized),
        normalized_accuracy_error=_error_of_share(normalized),
        fingerprint=fingerprint(requests),
    )


def build_hellaswag_requests(example: HellaSwagExample) -> list[Continuation]:
    """One for each ending."""
    context = preprocess(f"{example.activity}: {example.context}")
    return [encode_continuation(context, f" {preprocess(ending)}") for ending in example.endings]


def preprocess(text: str) -> str:
    """Without the marks that WikiHow's pages left ([header], [title], [step]), as in the harness;
    a file that has no marks any more stays as it is, but for its double spaces. The harness also
    begins the second half of a context with a capital: only possible where the file has the halves
    apart (`read_hellaswag`)."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# --- LAMBADA -------------------------------------------------------------------------------------


def lambada(
    model: GPT, path: str, batch_size: int, dtype: str, limit: int | None = None
) -> ProgressGenerator[LambadaResult]:
    """Paperno et al. 2016, "The LAMBADA dataset", arXiv:1606.06031, in OpenAI's variant (Radford et
    al. 2019), where texts keep their case and quotes: the last word of a passage.

    The word is what stands behind the last space. It is right where each of its tokens is the
    likeliest after those before it. `limit`, `batch_size`, `dtype` and errors as in `hellaswag`.
    """
    texts = list(read_lambada(path, limit))
    _refuse_nothing(path, texts)
    requests = [build_lambada_request(text) for text in texts]
    scores = yield from score_continuations(model, requests, batch_size, dtype, "LAMBADA")
    right = [each.is_greedy for each in scores]
    mean = -sum(each.log_likelihood for each in scores) / len(scores)
    return LambadaResult(
        examples=len(right),
        accuracy=sum(right) / len(right),
        accuracy_error=_error_of_share(right),
        perplexity=math.exp(min(mean, 700.0)),
        fingerprint=fingerprint(requests),
    )


def build_lambada_request(text: str) -> Continuation:
    context, _, word = text.rpartition(" ")
    return encode_continuation(context, f" {word}")


# --- both ----------------------------------------------------------------------------------------


def _refuse_nothing(path: str, examples: Sequence[object]) -> None:
    if not examples:
        raise BenchmarkError(Problem(path, "limit 0", "nothing to score", "allow one example"))


def _place_of_largest(values: Sequence[float]) -> int:
    """The first of equals, as numpy's argmax in the harness."""
    return values.index(max(values))


def _error_of_share(right: Sequence[bool]) -> float | None:
    """Sample standard deviation over the square root of the number, as in the harness."""
    count, share = len(right), sum(right) / len(right)
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
