"""HellaSwag and LAMBADA, zero-shot, scored as in lm-evaluation-harness (EleutherAI;
lm_eval/tasks/hellaswag and lm_eval/tasks/lambada/lambada_openai.yaml).
"""

import math
import re

import numpy as np

from gpt.artifacts import HellaSwagResult, LambadaResult
from gpt.evaluation.benchmark_files import ENDINGS, HellaSwagExample, read_hellaswag, read_lambada
from gpt.evaluation.heldout import standard_error
from gpt.evaluation.progress import ProgressGenerator
from gpt.evaluation.scoring import (
    Continuation,
    encode_continuation,
    fingerprint_continuations,
    score_continuations,
)
from gpt.model.base import GPT


def evaluate_hellaswag(
    model: GPT, path: str, batch_size: int, dtype: str, limit: int | None = None
) -> ProgressGenerator[HellaSwagResult]:
    """Evaluate which of four endings a model finds most likely after a context.

    Zellers et al. 2019, "HellaSwag: Can a Machine Really Finish Your Sentence?", arXiv:1905.07830.
    The model's answer is the ending with the highest log-likelihood after "activity: context " or,
    normalized, with the highest log-likelihood per byte of the ending (without the space before
    it). Arguments and errors as in `read_hellaswag` and `score_continuations`.
    """
    examples = read_hellaswag(path, limit)
    requests = [request for example in examples for request in build_hellaswag_requests(example)]
    scores = yield from score_continuations(model, requests, batch_size, dtype, "HellaSwag")
    likelihoods = np.array([each.log_likelihood for each in scores]).reshape(-1, ENDINGS)
    endings = [[preprocess(ending).encode() for ending in each.endings] for each in examples]
    sizes = np.array([[len(ending) or 1 for ending in four] for four in endings])
    labels = np.array([example.label for example in examples])
    # Of equal maxima, the first one, as in the harness.
    correct = likelihoods.argmax(axis=1) == labels
    correct_normalized = (likelihoods / sizes).argmax(axis=1) == labels
    return HellaSwagResult(
        examples=len(examples),
        accuracy=float(correct.mean()),
        accuracy_error=standard_error(correct),
        normalized_accuracy=float(correct_normalized.mean()),
        normalized_accuracy_error=standard_error(correct_normalized),
        fingerprint=fingerprint_continuations(requests),
    )


def build_hellaswag_requests(example: HellaSwagExample) -> list[Continuation]:
    """Build one continuation per ending."""
    context = preprocess(f"{example.activity}: {example.context}")
    return [encode_continuation(context, f" {preprocess(ending)}") for ending in example.endings]


def preprocess(text: str) -> str:
    """Remove WikiHow's markers ([header], [title], [step]) and double spaces, as the harness does.

    The harness also capitalises the second half of a context, which `read_hellaswag` does if the
    file has the halves in separate columns.
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def evaluate_lambada(
    model: GPT, path: str, batch_size: int, dtype: str, limit: int | None = None
) -> ProgressGenerator[LambadaResult]:
    """Evaluate how well a model predicts the last word of a passage.

    Paperno et al. 2016, "The LAMBADA dataset", arXiv:1606.06031, in OpenAI's variant (Radford et
    al. 2019), which keeps case and quotes. The word is what follows the last space; it is correct
    if each of its tokens is the most likely one after those before it. Arguments and errors as in
    `evaluate_hellaswag`.
    """
    texts = read_lambada(path, limit)
    requests = [build_lambada_request(text) for text in texts]
    scores = yield from score_continuations(model, requests, batch_size, dtype, "LAMBADA")
    correct = np.array([each.is_greedy for each in scores])
    mean_loss = -float(np.mean([each.log_likelihood for each in scores]))
    return LambadaResult(
        examples=len(texts),
        accuracy=float(correct.mean()),
        accuracy_error=standard_error(correct),
        perplexity=math.exp(min(mean_loss, 700.0)),
        fingerprint=fingerprint_continuations(requests),
    )


def build_lambada_request(text: str) -> Continuation:
    context, _, word = text.rpartition(" ")
    return encode_continuation(context, f" {word}")
