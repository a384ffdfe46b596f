"""The chunked loss against torch's cross-entropy on full logits."""

import pytest
import torch
from torch.nn import functional as F

from gpt.model.compile import find_compiler_error
from gpt.model.loss import linear_cross_entropy, score_tokens


def tensors(rows, width, vocabulary, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, width, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden, head, targets


def plain_losses(hidden, head, targets, softcap):
    logits = hidden @ head.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("softcap", [None, 15.0, 1.5])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "chunk_rows"), [(12, 11, 4), (13, 101, 5), (7, 64, 100), (1, 3, 1)]
)
def test_loss_and_gradients_equal_unchunked_cross_entropy(rows, vocabulary, chunk_rows, softcap):
    hidden, head, targets = tensors(rows, 6, vocabulary)
    chunked = linear_cross_entropy(hidden, head, targets, softcap, chunk_rows) * 0.37
    ours = torch.autograd.grad(chunked, (hidden, head))
    plain = plain_losses(hidden, head, targets, softcap).sum() * 0.37
    theirs = torch.autograd.grad(plain, (hidden, head))
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-12)


def test_gradients_pass_finite_differences():
    hidden, head, targets = tensors(5, 4, 7)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, 2.0, 2), (hidden, head)
    )


def test_token_losses_have_the_shape_of_the_targets():
    hidden, head, targets = tensors(12, 6, 31)
    losses, _ = score_tokens(hidden.view(3, 4, 6), head, targets.view(3, 4), 15.0, chunk_rows=5)
    assert losses.shape == (3, 4)
    torch.testing.assert_close(losses.flatten(), plain_losses(hidden, head, targets, 15.0).detach())


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_token_scores_are_losses_and_greedy_matches(softcap):
    hidden, head, targets = tensors(12, 6, 11)
    likeliest = (hidden @ head.T).argmax(dim=1)
    targets[::2] = likeliest[::2]
    losses, hits = score_tokens(hidden.view(3, 4, 6), head, targets.view(3, 4), softcap, 5)
    expected = plain_losses(hidden, head, targets, softcap).view(3, 4)
    torch.testing.assert_close(losses, expected.detach())
    assert torch.equal(hits, (targets == likeliest).view(3, 4))
    assert 6 <= hits.sum() < 12


def test_bfloat16_autocast_is_close_to_float32():
    hidden, head, targets = tensors(64, 32, 500, torch.float32)
    exact = linear_cross_entropy(hidden, head, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = linear_cross_entropy(hidden, head, targets)
    grads = torch.autograd.grad(rounded, (hidden, head))
    reference = torch.autograd.grad(exact, (hidden, head))
    assert rounded.dtype == torch.float32
    assert abs(rounded - exact) / exact < 1e-2
    for mine, other in zip(grads, reference, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() / other.norm() < 2e-2


def test_compiled_chunks_equal_eager_chunks():
    """Needs a C++ compiler; without one, this would compare eager chunks with themselves."""
    assert find_compiler_error("cpu") is None
    hidden, head, targets = tensors(10, 6, 101, torch.float32)
    eager = linear_cross_entropy(hidden, head, targets, 15.0, 4)
    fused = linear_cross_entropy(hidden, head, targets, 15.0, 4, compile_chunks=True)
    torch.testing.assert_close(fused, eager)
    for mine, other in zip(
        torch.autograd.grad(fused, (hidden, head)),
        torch.autograd.grad(eager, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_missing_compiler_is_logged_once_and_training_runs_eagerly(monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler found\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    find_compiler_error.cache_clear()
    hidden, head, targets = tensors(10, 6, 101)
    for _ in range(2):
        linear_cross_entropy(hidden, head, targets, None, 4, compile_chunks=True)
    find_compiler_error.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "torch.compile does not work here, so training runs eagerly: no C++ compiler found"
    ]
