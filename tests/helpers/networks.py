"""Small networks, and their counterparts from transformers."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt.config.schema import ModelSection


def model_section(architecture, **changes):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, **changes}
    return ModelSection(architecture=architecture, **sizes)


def randomize_weights(model):
    """Draw every weight at random, because weights of zero and one would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def build_hf_gpt2(ours):
    config = ours.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    weights = {
        f"transformer.{name}": tensor.T if is_conv1d(name) else tensor
        for name, tensor in ours.state_dict().items()
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return theirs, lambda name: f"transformer.{name}"


def is_conv1d(name):
    return name.endswith(".weight") and ("attn.c_" in name or "mlp.c_" in name)
