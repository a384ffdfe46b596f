"""GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", initialized as
there and in nanoGPT.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config.schema import ModelSection
from gpt.model.base import GPT, attend, merge_heads, split_heads
from gpt.model.kv_cache import KVCache, LayerKVCache


class GPT2Attention(nn.Module):
    """Causal multi-head attention: (batch, time, n_embd) -> (batch, time, n_embd)."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: LayerKVCache | None = None) -> Tensor:
        q, k, v = (split_heads(part, self.n_head) for part in self.c_attn(x).chunk(3, dim=-1))
        y = attend(q, k, v, self.dropout if self.training else 0.0, cache)
        return F.dropout(self.c_proj(merge_heads(y)), self.dropout, self.training)


class GPT2MLP(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        # The tanh form is GPT-2's own and Hugging Face's `gelu_new`.
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class GPT2Block(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = GPT2Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, cache: LayerKVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(GPT):
    """Learned positions, pre-LayerNorm, GELU, head tied to the embedding.

    Parameter names are those of Hugging Face's `GPT2Model`, whose Conv1D weights are transposed.
    """

    def __init__(self, config: ModelSection) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    @property
    def head(self) -> Tensor:
        return self.wte.weight  # tied to the embedding

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        first = cache.length if cache else 0
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        x = F.dropout(self.wte(ids) + self.wpe(positions), self.config.dropout, self.training)
        x = self._run_blocks(x, cache=cache)
        return self.ln_f(x)

    def init_weights(self) -> None:
        """Weights N(0, 0.02), residual projections divided by sqrt(2 * n_layer)."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)
