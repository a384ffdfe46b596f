"""The network of nanochat and of the NanoGPT speedrun's simple track
(github.com/KellerJordan/modded-nanogpt, records/track_3_optimization), with the details of Hugging
Face's `NanoChatForCausalLM`, so that exporting a model only renames its tensors.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config.schema import ModelSection
from gpt.model.base import GPT, attend, merge_heads, split_heads
from gpt.model.kv_cache import KVCache, LayerKVCache

NORM_EPSILON = 1e-6
ROTARY_BASE = 10_000.0
LOGIT_SOFTCAP = 15.0


class NanoChatAttention(nn.Module):
    """Attention with rotated and normalized queries and keys: (batch, time, n_embd) -> same."""

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
        q = _rms_norm(_rotate(split_heads(self.q_proj(x), self.n_head), cos, sin))
        k = _rms_norm(_rotate(split_heads(self.k_proj(x), self.n_head), cos, sin))
        v = split_heads(self.v_proj(x), self.n_head)
        y = attend(q, k, v, self.dropout if self.training else 0.0, cache)
        return F.dropout(self.o_proj(merge_heads(y)), self.dropout, self.training)


class NanoChatMLP(nn.Module):
    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.fc1 = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.fc2 = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Squared ReLU: So et al. 2021, "Primer", arXiv:2109.08668. Not `square()`: that is `pow`,
        # which CUDA autocast runs in float32, saving a float32 copy for backward.
        x = F.relu(self.fc1(x))
        return F.dropout(self.fc2(x * x), self.dropout, self.training)


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
    embedding, squared ReLU, untied head, logits capped at 15 (as in Gemma 2, arXiv:2408.00118).

    Parameter names are those of Hugging Face's `NanoChatForCausalLM` without the prefix `model.`.
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
            # A residual stream in the lower precision halves what its norms read and save.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        head_size = self.config.n_embd // self.config.n_head
        cos, sin = _rotary_angles(cache.length if cache else 0, ids.shape[1], head_size, x)
        return _rms_norm(self._run_blocks(_rms_norm(x), cos, sin, cache=cache))

    def init_weights(self) -> None:
        """Embedding N(0, 1); head and residual projections zero, so that each block starts as the
        identity and the loss at ln(vocab_size); other matrices uniform, std 0.5 / sqrt(fan_in)."""
        for name, parameter in self.named_parameters():
            if name.startswith("embed_tokens"):
                nn.init.normal_(parameter)
            elif name.endswith(("o_proj.weight", "fc2.weight", "lm_head.weight")):
                nn.init.zeros_(parameter)
            else:
                bound = 0.5 * math.sqrt(3 / parameter.shape[1])
                nn.init.uniform_(parameter, -bound, bound)


def _rms_norm(x: Tensor) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) without weights, in the dtype of `x`.

    The kernel sums in float32 anyway; autocast would save float32 copies of `x` for backward.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPSILON)


def _rotary_angles(first: int, time: int, head_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cos and sin for positions first, ..., first + time - 1 and each pair of channels:
    (time, head_size / 2) each."""
    exponents = torch.arange(0, head_size, 2, device=like.device, dtype=torch.float32) / head_size
    positions = torch.arange(first, first + time, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, ROTARY_BASE**-exponents)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (channel i, channel i + half) clockwise by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
