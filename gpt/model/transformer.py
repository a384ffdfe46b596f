"""The network: token ids in, hidden states out. The head belongs to `gpt.model.loss`, because the
logits of a whole batch are the largest thing in training and nobody needs them at once.

GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; weights are
initialised as there and in nanoGPT, residual projections smaller by sqrt(2 n_layer).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config import ModelSection


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past: (batch, time, n_embd) -> the same."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = (batch, time, self.n_head, width // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(width, dim=2))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(batch, time, width)))


class MLP(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        # The tanh form is GPT-2's own and Hugging Face's `gelu_new`.
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Learned positions, LayerNorm before each part, GELU, head tied to the embedding.

    Parameter names are those of Hugging Face's `GPT2Model`; its Conv1D weights are the transposes.
    """

    logit_softcap: float | None = None

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    @property
    def head(self) -> Tensor:
        """(vocab_size, n_embd): tied to the embedding."""
        return self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, time) int64 -> (batch, time, n_embd); logits are this times `head` transposed."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.drop(self.wte(ids) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)

    def initialize(self) -> None:
        """Draw all weights from torch's random state."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)


def build_model(config: ModelSection) -> GPT2:
    """The network on the current default device, weights drawn from torch's random state; under
    `torch.device("meta")` shapes alone."""
    model = GPT2(config)
    model.initialize()
    return model


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers, a tied matrix counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
