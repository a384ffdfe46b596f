"""FLOPs of training."""

from __future__ import annotations

from gpt.config.schema import RunConfig


def flops_per_token(config: RunConfig) -> int:
    """Return the FLOPs of training per token: 6 N + 12 n_layer n_embd block_size.

    This is the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) and of
    nanoGPT's `estimate_mfu`, so that utilizations compare. N counts the weights that take part in
    matrix products: those of the blocks and of the head, which is the embedding if they are tied.
    An untied embedding and learned positions are looked up and do not count; nor do vectors. The
    factor 6 is a multiplication and an addition, once forward and twice backward. The second term
    is attention's scores and sums over the whole block, forward and backward, as if it were not
    causal. Recomputation by activation checkpointing does not count.
    """
    model = config.model
    multiplied = 12 * model.n_layer * model.n_embd**2 + model.vocab_size * model.n_embd
    return 6 * multiplied + 12 * model.n_layer * model.n_embd * model.block_size
