"""Head and cross-entropy without the logits of a whole batch.

At 16 x 1024 tokens and 50,304 ids the logits alone are 1.65 GB in bfloat16 and twice that in
float32, before their gradient: more than the rest of a small GPT. Here the rows go through the
head a chunk at a time, and each chunk's gradients are made while its logits exist, so that only
(tokens x n_embd) and (vocab_size x n_embd) outlive it. The idea is that of Apple's "Cut Your
Losses in Large-Vocabulary Language Models" (Wijmans et al. 2024, arXiv:2411.09009) and Liger
Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989), in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt.model.compile import compile_if_supported, find_compiler_error


def default_chunk_rows(device: torch.device, compile_chunks: bool = False) -> int:
    """Rows a chunk where the config names none: on a GPU enough that adding a chunk's gradient to
    the whole head's (vocab_size x n_embd, float32) is small beside the chunk's own products; on a
    CPU what measured fastest (tests/benchmarks), eager chunks staying small enough that the
    allocator keeps their memory instead of asking the system for it again."""
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
    """Sum of the cross-entropy over all tokens, nats, as a float32 scalar (float64 for float64).

    hidden: (..., n_embd); head: (vocab_size, n_embd); targets: (...) int64. With `softcap` c the
    logits are c tanh(z / c). Differentiable in `hidden` and `head`, once. Matrix products are in
    autocast's type where autocast is on, everything between them in float32. `compile_chunks` fuses
    what is between them.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    compile_chunks = compile_chunks and find_compiler_error(rows.device.type) is None
    chunk_rows = chunk_rows or default_chunk_rows(rows.device, compile_chunks)
    return _SummedLoss.apply(rows, head, targets.reshape(-1), softcap, chunk_rows, compile_chunks)


@torch.no_grad()
def token_losses(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Cross-entropy of each token, nats: the shape of `targets`, float32. No gradient."""
    chunks = _logits_by_chunk(hidden, head, targets, softcap, chunk_rows)
    return torch.cat([_losses(logits, wanted) for logits, wanted in chunks]).view(targets.shape)


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_losses`, and whether each target is the id with the highest logit: bool, the same
    shape."""
    losses, likeliest = [], []
    for logits, wanted in _logits_by_chunk(hidden, head, targets, softcap, chunk_rows):
        losses.append(_losses(logits, wanted))
        likeliest.append(logits.argmax(dim=1) == wanted)
    return torch.cat(losses).view(targets.shape), torch.cat(likeliest).view(targets.shape)


def _logits_by_chunk(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None, chunk_rows: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (rows, vocab_size) and targets (rows,), a chunk at a time."""
    rows, head = _in_compute_dtype(hidden.reshape(-1, hidden.shape[-1]), head)
    chunk_rows = chunk_rows or default_chunk_rows(rows.device)
    for chunk, wanted in zip(
        rows.split(chunk_rows), targets.reshape(-1).split(chunk_rows), strict=True
    ):
        yield compute_logits(chunk, head, softcap)[0], wanted


def compute_logits(
    rows: Tensor, head: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Logits (rows, vocab_size) in float32 at least, and tanh(z / softcap) where there is a cap."""
    z = rows @ head.T
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap is None:
        return z, None
    squashed = torch.tanh(z / softcap)
    return squashed * softcap, squashed


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    wanted = logits.gather(1, targets[:, None]).squeeze(1)
    return torch.logsumexp(logits, dim=1) - wanted


def _in_compute_dtype(rows: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return rows.to(dtype), head.to(dtype)
    return rows, head.to(rows.dtype)


def _chunk(
    rows: Tensor, head: Tensor, targets: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Loss of one chunk (scalar) and its gradient by the uncapped logits (rows, vocab_size)."""
    logits, squashed = compute_logits(rows, head, softcap)
    total = torch.logsumexp(logits, dim=1, keepdim=True)
    loss = (total - logits.gather(1, targets[:, None])).sum()
    # d loss / d logits = softmax - one-hot; through the cap times 1 - tanh^2.
    vocabulary = torch.arange(logits.shape[1], device=logits.device)
    slope = torch.exp(logits - total) - (vocabulary == targets[:, None]).to(logits.dtype)
    if squashed is not None:
        slope = slope * (1 - squashed * squashed)
    return loss, slope.to(rows.dtype)


_Gradients = tuple[Tensor | None, Tensor | None, None, None, None, None]


class _SummedLoss(torch.autograd.Function):
    """Makes its gradients in forward, chunk by chunk; backward only scales them."""

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
        rows, weight = _in_compute_dtype(hidden, head)
        wide = torch.promote_types(rows.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=rows.device)
        row_grad = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        head_grad = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        make_chunk = compile_if_supported(_chunk, rows.device) if compile_chunks else _chunk
        for start in range(0, rows.shape[0], chunk_rows):
            part = slice(start, start + chunk_rows)
            chunk_loss, slope = make_chunk(rows[part], weight, targets[part], softcap)
            loss += chunk_loss
            if row_grad is not None:
                torch.mm(slope, weight, out=row_grad[part])
            if head_grad is not None:
                _accumulate(head_grad, slope, rows[part])
            del slope  # else it lives on beside the next chunk's
        ctx.save_for_backward(row_grad, head_grad)
        ctx.dtypes = hidden.dtype, head.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        row_grad, head_grad = ctx.saved_tensors
        hidden_dtype, head_dtype = ctx.dtypes
        if row_grad is not None:
            row_grad = (row_grad * grad).to(hidden_dtype)
        if head_grad is not None:
            head_grad = (head_grad * grad).to(head_dtype)
        return row_grad, head_grad, None, None, None, None


def _accumulate(head_grad: Tensor, slope: Tensor, rows: Tensor) -> None:
    """head_grad += slope^T rows, summed in head_grad's type."""
    if slope.dtype == head_grad.dtype:
        head_grad.addmm_(slope.T, rows)
    else:
        head_grad += slope.T @ rows
