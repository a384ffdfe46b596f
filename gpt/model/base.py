"""What every architecture shares: token ids in, hidden states out.

The head is applied in `gpt.model.loss`, because the logits of a whole batch are the largest tensor
in training and are never needed at once.
"""

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt.config.schema import ModelSection
from gpt.model.kv_cache import KVCache, LayerKVCache


class GPT(nn.Module):
    """Base class of the architectures.

    A subclass defines `forward`, `head`, `blocks` and `init_weights`, and sets `logit_softcap` if
    its logits are capped.
    """

    logit_softcap: float | None = None
    """c in c * tanh(logit / c); None: logits are not capped."""

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """In training, keep only the input of each block and recompute the rest in backward."""

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Compute the hidden states: (batch, time) int64 -> (batch, time, n_embd).

        With a `cache`, `ids` continue the sequence it holds, and their keys and values are added.
        """
        raise NotImplementedError

    @property
    def head(self) -> Tensor:
        """Output matrix, (vocab_size, n_embd): logits = hidden states @ head.T."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        raise NotImplementedError

    def init_weights(self) -> None:
        """Draw all weights from torch's global random state."""
        raise NotImplementedError

    def num_parameters(self) -> int:
        """Count the trainable parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _run_blocks(self, x: Tensor, *extra: Tensor, cache: KVCache | None = None) -> Tensor:
        for index, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, *extra, cache=cache.layers[index])
            elif self.activation_checkpointing and self.training:
                x = checkpoint(block, x, *extra, use_reentrant=False)
            else:
                x = block(x, *extra)
        return x


def split_heads(x: Tensor, n_head: int) -> Tensor:
    """(batch, time, n_embd) -> (batch, n_head, time, head size)."""
    return x.view(*x.shape[:2], n_head, -1).transpose(1, 2)


def merge_heads(y: Tensor) -> Tensor:
    """(batch, n_head, time, head size) -> (batch, time, n_embd)."""
    return y.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, cache: LayerKVCache | None) -> Tensor:
    """Causal attention, including what the cache holds: (batch, n_head, time, head size) each."""
    if cache is not None:
        k, v = cache.extend(k, v)
    # A single new token may see everything. torch aligns its causal mask at the top left, which
    # would hide all but the first position.
    causal = q.shape[2] == k.shape[2]
    scale, size = None, q.shape[3]
    if padding := head_padding(q):
        q, k, v = (F.pad(part, (0, padding)) for part in (q, k, v))
        scale = size**-0.5
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale)
    return y[..., :size]


def head_padding(q: Tensor) -> int:
    """Return the channels by which a head must grow for every attention kernel of CUDA.

    FlashAttention pads by itself. Memory-efficient attention, which GPUs before Ampere use, refuses
    rows that are no multiple of 16 bytes, and torch would compute whole (time, time) matrices.
    """
    return -q.shape[3] % (16 // q.element_size()) if q.is_cuda else 0
