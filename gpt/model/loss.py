"""Output head and cross-entropy without the logits of a whole batch.

At 16 x 1024 tokens and 50,304 ids the logits alone take 1.65 GB in bfloat16 and twice that in
float32, before their gradient: more than the rest of a small GPT. Here the rows pass the head in
chunks, and the gradients of a chunk are computed while its logits exist, so that only tensors of
(tokens, n_embd) and (vocab_size, n_embd) remain. The idea is that of Apple's "Cut Your Losses in
Large-Vocabulary Language Models" (Wijmans et al. 2024, arXiv:2411.09009) and of Liger Kernel's
fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989), in plain torch.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt.model.compile import compile_if_supported, find_compiler_error


def default_chunk_rows(device: torch.device, compile_chunks: bool = False) -> int:
    """Return the number of rows per chunk if the config does not set it.

    On a GPU a chunk is large enough that adding its gradient to the head's (vocab_size, n_embd) in
    float32 is cheap beside its matrix products. On a CPU the values are the fastest measured
    (tests/benchmarks); eager chunks stay small enough for the allocator to reuse their memory.
    """
    if device.type == "cuda":
        return 2048
    return 512 if compile_chunks else 128


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    compile_chunks: bool = False,
) -> Tensor:
    """Compute the sum of the cross-entropy over all tokens, in nats.

    Returns a float32 scalar (float64 for float64 inputs) that can be differentiated once with
    respect to `hidden` and `head`. Matrix products run in autocast's dtype if autocast is on,
    everything between them in float32.

    Args:
        hidden: Hidden states, (..., n_embd).
        head: Output matrix, (vocab_size, n_embd).
        targets: Ids to predict, (...) int64.
        softcap: c in c * tanh(logit / c); None: logits are not capped.
        chunk_rows: Tokens per chunk; default: see `default_chunk_rows`.
        compile_chunks: Fuse the operations between the matrix products.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    compile_chunks = compile_chunks and find_compiler_error(rows.device.type) is None
    chunk_rows = chunk_rows or default_chunk_rows(rows.device, compile_chunks)
    return _LinearCrossEntropy.apply(
        rows, head, targets.reshape(-1), softcap, chunk_rows, compile_chunks
    )


@torch.no_grad()
def score_tokens(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of each token, and whether it has the highest logit.

    Returns losses in nats, float32, and a bool tensor, both in the shape of `targets`. Arguments as
    in `linear_cross_entropy`; without gradient.
    """
    rows, head = _to_compute_dtype(hidden.reshape(-1, hidden.shape[-1]), head)
    size = chunk_rows or default_chunk_rows(rows.device)
    losses, is_greedy = [], []
    for chunk, wanted in zip(rows.split(size), targets.reshape(-1).split(size), strict=True):
        logits = compute_logits(chunk, head, softcap)[0]
        chosen = logits.gather(1, wanted[:, None]).squeeze(1)
        losses.append(torch.logsumexp(logits, dim=1) - chosen)
        is_greedy.append(logits.argmax(dim=1) == wanted)
        del logits  # or the next chunk's would be allocated beside them
    return torch.cat(losses).view(targets.shape), torch.cat(is_greedy).view(targets.shape)


def compute_logits(
    rows: Tensor, head: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Compute logits (rows, vocab_size) in at least float32, and tanh(z / softcap) if capped."""
    z = rows @ head.T
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap is None:
        return z, None
    squashed = torch.tanh(z / softcap)
    return squashed * softcap, squashed


def _to_compute_dtype(rows: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return rows.to(dtype), head.to(dtype)
    return rows, head.to(rows.dtype)


def _chunk_loss(
    rows: Tensor, head: Tensor, targets: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Compute the loss of one chunk and its gradient by the uncapped logits, (rows, vocab_size)."""
    logits, squashed = compute_logits(rows, head, softcap)
    total = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = (total - logits.gather(1, targets[:, None])).sum()
    # d loss / d logits = softmax - one-hot; the cap multiplies it by 1 - tanh^2.
    vocabulary = torch.arange(logits.shape[1], device=logits.device)
    logit_grad = torch.exp(logits - total) - (vocabulary == targets[:, None]).to(logits.dtype)
    if squashed is not None:
        logit_grad = logit_grad * (1 - squashed * squashed)
    return loss, logit_grad.to(rows.dtype)


@cache
def _compiled_chunk_loss(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    return compile_if_supported(_chunk_loss, device)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes its gradients in forward, chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        softcap: float | None,
        chunk_rows: int,
        compile_chunks: bool,
    ) -> Tensor:
        rows, weight = _to_compute_dtype(hidden, head)
        wide = torch.promote_types(rows.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=rows.device)
        row_grad, head_grad = torch.empty_like(rows), torch.zeros_like(weight, dtype=wide)
        chunk_loss = _compiled_chunk_loss(rows.device) if compile_chunks else _chunk_loss
        for start in range(0, rows.shape[0], chunk_rows):
            part = slice(start, start + chunk_rows)
            part_loss, logit_grad = chunk_loss(rows[part], weight, targets[part], softcap)
            loss += part_loss
            torch.mm(logit_grad, weight, out=row_grad[part])
            if logit_grad.dtype == wide:
                head_grad.addmm_(logit_grad.T, rows[part])
            else:
                head_grad += logit_grad.T @ rows[part]
            del logit_grad  # or two of them would be allocated at once
        ctx.save_for_backward(row_grad, head_grad)
        ctx.dtypes = hidden.dtype, head.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        row_grad, head_grad = ((each * grad).to(dtype) for each, dtype in gradients)
        return row_grad, head_grad, None, None, None, None
