"""The networks: token ids in, hidden states out. The head belongs to `gpt.model.loss`, because the
logits of a whole batch are the largest thing in training and nobody needs them at once.

`GPT2`: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", initialised as
there and in nanoGPT. `NanoChat`: the network of nanochat and of the NanoGPT speedrun's simple
track (github.com/KellerJordan/modded-nanogpt, records/track_3_optimization), with the details of
Hugging Face's `NanoChatForCausalLM`, so that exporting is renaming.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt.config.schema import ModelSection
from gpt.model.kv_cache import KVCache, LayerKVCache

NORM_EPSILON = 1e-6
ROTARY_BASE = 10_000.0
LOGIT_SOFTCAP = 15.0


class GPT(nn.Module):
    """What every architecture has: `forward`, a `head`, a cap on its logits, initial weights."""

    logit_softcap: float | None = None
    """c in c tanh(logit / c); None: logits as they are."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Whether training keeps only the input of each block and computes the rest again in
        backward (activation checkpointing)."""

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """(batch, time) int64 -> (batch, time, n_embd).

        With a `cache` the ids follow those that it holds, and theirs are added to it.
        """
        raise NotImplementedError

    @property
    def head(self) -> Tensor:
        """(vocab_size, n_embd): logits are hidden states times this transposed."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        raise NotImplementedError

    def initialize(self) -> None:
        """Draw all weights from torch's random state."""
        raise NotImplementedError

    def _through_blocks(self, x: Tensor, *extra: Tensor, cache: KVCache | None = None) -> Tensor:
        for index, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, *extra, cache=cache.blocks[index])
            elif self.activation_checkpointing and self.training:
                x = checkpoint(block, x, *extra, use_reentrant=False)
            else:
                x = block(x, *extra)
        return x


# --- gpt2 ----------------------------------------------------------------------------------------


class GPT2Attention(nn.Module):
    """Multi-head attention over the past: (batch, time, n_embd) -> the same."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, cache: LayerKVCache | None = None) -> Tensor:
        q, k, v = (_heads(part, self.n_head) for part in self.c_attn(x).chunk(3, dim=-1))
        y = _attended(q, k, v, self.dropout if self.training else 0.0, cache)
        return F.dropout(self.c_proj(_joined(y)), self.dropout, self.training)


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
    """Learned positions, LayerNorm before each part, GELU, head tied to the embedding.

    Parameter names are those of Hugging Face's `GPT2Model`; its Conv1D weights are the transposes.
    """

    def __init__(self, config: ModelSection) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    @property
    def head(self) -> Tensor:
        """Tied to the embedding."""
        return self.wte.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        first = cache.length if cache else 0
        positions = torch.arange(first, first + ids.shape[1], device=ids.device)
        x = F.dropout(self.wte(ids) + self.wpe(positions), self.config.dropout, self.training)
        x = self._through_blocks(x, cache=cache)
        return self.ln_f(x)

    def initialize(self) -> None:
        """N(0, 0.02), residual projections smaller by sqrt(2 n_layer)."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)


# --- nanochat ------------------------------------------------------------------------------------


class NanoChatAttention(nn.Module):
    """Attention with rotated, then normed queries and keys: (batch, time, n_embd) -> the same."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        width = config.n_embd
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerKVCache | None = None
    ) -> Tensor:
        q = _rms_norm(_rotated(_heads(self.q_proj(x), self.n_head), cos, sin))
        k = _rms_norm(_rotated(_heads(self.k_proj(x), self.n_head), cos, sin))
        v = _heads(self.v_proj(x), self.n_head)
        y = _attended(q, k, v, self.dropout if self.training else 0.0, cache)
        return F.dropout(self.o_proj(_joined(y)), self.dropout, self.training)


class NanoChatMLP(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.fc1 = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.fc2 = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # ReLU squared: So et al. 2021, "Primer", arXiv:2109.08668.
        return F.dropout(self.fc2(F.relu(self.fc1(x)).square()), self.dropout, self.training)


class NanoChatBlock(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.self_attn = NanoChatAttention(config)
        self.mlp = NanoChatMLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerKVCache | None = None
    ) -> Tensor:
        x = x + self.self_attn(_rms_norm(x), cos, sin, cache)
        return x + self.mlp(_rms_norm(x))


class NanoChat(GPT):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), RMSNorm without weights, also after the
    embedding, ReLU squared, untied head, logits capped at 15 (as Gemma 2, arXiv:2408.00118).

    Parameter names are those of Hugging Face's `NanoChatForCausalLM` without its `model.`.
    """

    logit_softcap = LOGIT_SOFTCAP

    def __init__(self, config: ModelSection) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(NanoChatBlock(config) for _ in range(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        return self.lm_head.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.embed_tokens(ids)
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream in the low type halves what its norms read and keep.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        head_size = self.config.n_embd // self.config.n_head
        cos, sin = _rotations(cache.length if cache else 0, ids.shape[1], head_size, x)
        return _rms_norm(self._through_blocks(_rms_norm(x), cos, sin, cache=cache))

    def initialize(self) -> None:
        """Embedding N(0, 1); head and residual projections zero, so that a block begins as the
        identity and the loss at ln(vocab_size); other matrices uniform, std 0.5 / sqrt(fan in)."""
        for name, parameter in self.named_parameters():
            if name.startswith("embed_tokens"):
                nn.init.normal_(parameter)
            elif name.endswith(("o_proj.weight", "fc2.weight", "lm_head.weight")):
                nn.init.zeros_(parameter)
            else:
                bound = 0.5 * math.sqrt(3 / parameter.shape[1])
                nn.init.uniform_(parameter, -bound, bound)


def _heads(x: Tensor, n_head: int) -> Tensor:
    """(batch, time, n_embd) -> (batch, n_head, time, head size)."""
    return x.view(*x.shape[:2], n_head, -1).transpose(1, 2)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, cache: LayerKVCache | None
) -> Tensor:
    """Attention over the past, that in the cache too: (batch, n_head, time, head size) each."""
    if cache is not None:
        k, v = cache.extend(k, v)
    # The one newest token sees everything; then torch's causal mask, aligned at the top left,
    # would hide all but the first.
    causal = q.shape[2] == k.shape[2]
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)


def _joined(y: Tensor) -> Tensor:
    """(batch, n_head, time, head size) -> (batch, time, n_embd)."""
    return y.transpose(1, 2).flatten(2)


def _rms_norm(x: Tensor) -> Tensor:
    """Zhang & Sennrich 2019, arXiv:1910.07467, without weights; the type of `x` stays.

    Sums in float32 by itself; autocast would keep whole float32 copies for backward.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPSILON)


def _rotations(first: int, time: int, head_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of `time` positions from `first` on and of every pair of channels:
    (time, head_size / 2) each."""
    exponents = torch.arange(0, head_size, 2, device=like.device, dtype=torch.float32) / head_size
    positions = torch.arange(first, first + time, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, ROTARY_BASE**-exponents)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (channel i, channel i + half) by its position's angle, clockwise."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


# --- any -----------------------------------------------------------------------------------------

ARCHITECTURES: dict[str, type[GPT]] = {"gpt2": GPT2, "nanochat": NanoChat}


def build_model(config: ModelSection) -> GPT:
    """The network on the current default device, weights drawn from torch's random state; under
    `torch.device("meta")` shapes alone."""
    model = ARCHITECTURES[config.architecture](config)
    model.initialize()
    return model


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers, a tied matrix counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
