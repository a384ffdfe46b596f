"""Operations that training does for one token."""

from __future__ import annotations

from gpt.config.schema import ModelSection, RunConfig


def flops_per_token(config: RunConfig | ModelSection) -> int:
    """Operations that training does for one token: 6 N + 12 n_layer n_embd block_size.

    The convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) and of nanoGPT's
    `estimate_mfu`, so that utilisations compare. N counts the weights that a token is multiplied
    with: the matrices of the blocks and the head, which is the embedding where they are tied. An
    untied embedding and learned positions are looked up, not multiplied, and count nothing; nor do
    vectors. 6 are a multiplication and an addition, once forward and twice backward. The second
    term is attention's scores and sums over the whole block, forward and backward, as if not
    causal. Activation checkpointing computes more than this and none of it counts.
    """
    model = config.model if isinstance(config, RunConfig) else config
    multiplied = 12 * model.n_layer * model.n_embd**2 + model.vocab_size * model.n_embd
    return 6 * multiplied + 12 * model.n_layer * model.n_embd * model.block_size
