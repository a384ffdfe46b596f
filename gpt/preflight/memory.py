"""Peak memory of a training step on one device, by part, counted tensor by tensor.

Five moments of a step can be the peak. For each, the model adds up what autograd and the code in
`gpt.model` hold at that moment; the estimate is the largest sum.

- loss: the loss of the last micro-batch is computed. Weights, gradients of the micro-batches before
  it, optimizer states, all activations, the gradients of the hidden states and of the head, and one
  chunk of logits with what is computed from it.
- loss_backward: the loss returns its two gradients, scaled, while it still holds the originals.
- backward: the backward pass is in the last block.
- embedding: a tied matrix sums its two gradients, from the head and from the embedding.
- update: the optimizer's temporaries.

Per token and block, with C = n_embd, H = n_head and e = bytes per element of the matmul dtype (2
under autocast, else 4), autograd saves
- gpt2: the inputs of both norms (4 C each: the residual stream is float32), the inputs of the four
  linear layers (e C, e C, e C, 4 e C), queries, keys and values (3 e C), the input of GELU (4 e C);
  attention's logsumexp (4 H), mean and deviation of both norms (16).
- nanochat: the inputs of the norms in float32 (4 C each: two on the stream, one each for queries
  and keys), the inputs of the linear layers (e C, e C, e C, 4 e C), queries, keys, values and
  attention's output (4 e C), ReLU's output (4 e C); logsumexp and deviations (8 + 12 H).
Attention is FlashAttention (Dao 2023, arXiv:2307.08691), so no tokens x tokens matrix exists. Its
16-bit CUDA kernels pad heads to a multiple of 8 channels, and the padded copies are saved. Autocast
caches 16-bit copies of all block matrices, and one of the head while the loss is computed.
Activation checkpointing saves the input of each block and recomputes one block at a time. Dropout
saves one byte per element. The method is that of Korthikanti et al. 2022 (arXiv:2205.05198).

`peak_bytes` is for a step without compilation: the value that
`torch.distributed._tools.mem_tracker.MemTracker` reports under fake tensors (tests hold the
estimate within 10% of it) and `torch.cuda.max_memory_allocated` on a GPU. With compilation
(`compiled_bytes`), nanochat's norms save their inputs in the matmul dtype, and of a chunk only the
logits and their gradient exist.

`overheads` are in neither measurement and are assumed: the CUDA context with the code of cuBLAS and
cuDNN, about 0.5 GB; memory that torch's caching allocator holds unused, 4% with expandable
segments; buffers of compiled graphs. Whether a run fits is decided on the sum.

With several devices, each holds this for its own micro-batches, and
- ddp: gradients during the whole step, because the communication buckets are views of the gradients
  (DistributedDataParallel with gradient_as_bucket_view=True; without it, or if gradients are set to
  None between steps instead of to zero, the buckets come on top);
- fsdp (fully_shard on each block, then on the root): its share of weights, optimizer states and
  reduced gradients; gathered in float32, two blocks (the current and the next one) and everything
  outside the blocks, which stays gathered from forward to backward (the default for the root).
  Gradients are unsharded while several micro-batches are summed, because they are reduced after the
  last one (set_requires_gradient_sync). Autocast's copies are not sharded.
Memory that NCCL allocates is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gpt.config.schema import ModelSection, RunConfig
from gpt.hardware.gpus import MIB
from gpt.preflight.parameters import Parameters, count_parameters

Sharding = Literal["ddp", "fsdp"]

CUDA_CHUNK_ROWS = 2048
CPU_CHUNK_ROWS = 512
CUDA_CONTEXT_BYTES = 500 * MIB
COMPILED_BUFFERS_BYTES = 100 * MIB
ALLOCATOR_SHARE = 0.04


@dataclass(frozen=True)
class Memory:
    """Peak memory of one device. `parts` add up to `peak_bytes`."""

    moment: str
    parts: Mapping[str, int]
    compiled_bytes: int
    """The peak with compilation; equal to `peak_bytes` if nothing is compiled."""
    overheads: Mapping[str, int]
    evaluation_bytes: int
    """Peak of an evaluation during training, at its own batch size, without compilation."""
    chunk_rows: int
    """Tokens whose logits exist at once."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """Memory that the device must have, overheads included."""
        return max(self.compiled_bytes, self.evaluation_bytes) + sum(self.overheads.values())


def estimate_memory(config: RunConfig, sharding: Sharding = "ddp") -> Memory:
    """Estimate the peak memory of training and evaluation on one of the config's GPUs, or on a CPU
    if the config asks for one. `sharding` matters with several devices only.

    The GPU model does not matter: without bfloat16 it computes in float16, which is as wide.
    """
    on_cpu = config.hardware.device == "cpu"
    step = _Step.from_config(config, sharding, compiled=False)
    moment, parts = step.peak()
    # On a CPU only the loss is compiled, and memory is not judged.
    compiled = config.training.compile and not on_cpu
    compiled_parts = _Step.from_config(config, sharding, True).peak()[1] if compiled else parts
    compiled_bytes = sum(compiled_parts.values())
    overheads = {
        "cuda_context": CUDA_CONTEXT_BYTES,
        "allocator": round(ALLOCATOR_SHARE * compiled_bytes),
        "compiled_buffers": COMPILED_BUFFERS_BYTES if compiled else 0,
    }
    return Memory(
        moment=moment,
        parts=parts,
        compiled_bytes=compiled_bytes,
        overheads={} if on_cpu else overheads,
        evaluation_bytes=step.evaluation_bytes(config.evaluation.batch_size),
        chunk_rows=step.chunk_rows,
    )


@dataclass(frozen=True)
class _Step:
    """Sizes of a training step. Without a unit in the name they are bytes."""

    model: ModelSection
    parameters: Parameters
    tokens: int
    """Per micro-batch."""
    chunk_rows: int
    width: int
    """Bytes per element of the matmul dtype: e above."""
    muon: bool
    accumulates: bool
    """Whether gradients of earlier micro-batches exist during a forward pass."""
    checkpointed: bool
    compiled: bool
    shards: int
    """Devices that each hold a share of the model; 1 with ddp."""

    @classmethod
    def from_config(cls, config: RunConfig, sharding: Sharding, compiled: bool) -> _Step:
        training, on_cpu = config.training, config.hardware.device == "cpu"
        world_size = config.hardware.world_size
        is_ddp = world_size > 1 and sharding == "ddp"
        return cls(
            model=config.model,
            parameters=count_parameters(config.model),
            tokens=training.batch_size * config.model.block_size,
            chunk_rows=training.loss_chunk_rows or (CPU_CHUNK_ROWS if on_cpu else CUDA_CHUNK_ROWS),
            width=4 if training.dtype == "float32" or on_cpu else 2,
            muon=config.optimizer.name == "muon",
            accumulates=is_ddp or training.grad_acc > world_size,
            checkpointed=training.activation_checkpointing,
            compiled=compiled,
            shards=world_size if sharding == "fsdp" else 1,
        )

    def peak(self) -> tuple[str, dict[str, int]]:
        """Return the moment of the peak and its parts."""
        moments = {
            "loss": self._at_loss(),
            "loss_backward": self._at_loss_backward(),
            "backward": self._at_backward(),
            "embedding": self._at_embedding(),
            "update": self._at_update(),
        }
        return max(moments.items(), key=lambda item: sum(item[1].values()))

    # --- sizes -----------------------------------------------------------------------------------

    @property
    def _autocast(self) -> bool:
        return self.width == 2

    @property
    def _gpt2(self) -> bool:
        return self.model.architecture == "gpt2"

    @property
    def _stream_width(self) -> int:
        """Bytes per element of the residual stream and of the hidden states."""
        return 4 if self._gpt2 else self.width

    @property
    def _norm_width(self) -> int:
        """Bytes per element that nanochat's norms save of their inputs: without compilation they
        consist of operations that run in float32."""
        return self.width if self.compiled else 4

    @property
    def _values(self) -> int:
        """Elements in one tensor of hidden states."""
        return self.tokens * self.model.n_embd

    @property
    def _head_values(self) -> int:
        return self.model.vocab_size * self.model.n_embd

    def _block(self) -> int:
        """What autograd saves for one block."""
        heads, e = self.model.n_head, self.width
        if self._gpt2:
            saved, small = 8 + 14 * e, 16 + 4 * heads
        else:
            saved, small = 4 * self._norm_width + 15 * e, 8 + 12 * heads
        masks = 2 if self.model.dropout else 0
        return (saved + masks) * self._values + small * self.tokens + self._padding()

    def _padding(self) -> int:
        """Four padded copies instead of queries, keys and values: the output is saved as well."""
        head_size = self.model.n_embd // self.model.n_head
        if not self._autocast or head_size % 8 == 0:
            return 0
        padded_values = -(-head_size // 8) * 8 * self.model.n_head * self.tokens
        return self.width * (4 * padded_values - 3 * self._values)

    def _ends(self) -> int:
        """Inputs and targets of this micro-batch, inputs of the one before, positions, and what the
        first and the last norm save."""
        model, ids = self.model, 24 * self.tokens
        if self._gpt2:
            masks = self._values if model.dropout else 0
            return ids + 8 * model.block_size + 4 * self._values + masks
        rotations = self.width * model.block_size * (model.n_embd // model.n_head)
        return ids + rotations + 2 * self._norm_width * self._values

    def _activations(self) -> int:
        """All that autograd holds at the end of the forward pass."""
        block = self._stream_width * self._values if self.checkpointed else self._block()
        return self._ends() + self.model.n_layer * block

    def _weight_copies(self) -> int:
        return 2 * self.parameters.block_matrices if self._autocast else 0

    def _gradients_before(self) -> int:
        """Gradients during a forward pass: the sum over the micro-batches before it."""
        return 4 * self.parameters.total if self.accumulates else 0

    def _share(self, size: int) -> int:
        """One device's share of something that fsdp shards."""
        return -(-size // self.shards)

    def _optimizer_states(self) -> int:
        """AdamW keeps two float32 numbers per parameter, Muon one."""
        single = self.parameters.block_matrices if self.muon else 0
        return self._share(4 * (2 * self.parameters.total - single))

    def _weights(self) -> int:
        """With fsdp the device's share, plus what is gathered."""
        total, blocks = self.parameters.total, self.parameters.in_blocks
        if self.shards == 1:
            return 4 * total
        gathered = total - blocks + min(2, self.model.n_layer) * blocks // self.model.n_layer
        return self._share(4 * total) + 4 * gathered

    def _parts(
        self,
        gradients: int,
        activations: int = 0,
        autocast_copies: int = 0,
        loss: int = 0,
        temporaries: int = 0,
        weights: int | None = None,
    ) -> dict[str, int]:
        return {
            "weights": self._weights() if weights is None else weights,
            "gradients": gradients,
            "optimizer_states": self._optimizer_states(),
            "activations": activations,
            "autocast_copies": autocast_copies,
            "loss": loss,
            "temporaries": temporaries,
        }

    # --- moments ---------------------------------------------------------------------------------

    def _at_loss(self) -> dict[str, int]:
        e, hidden = self.width, self._stream_width * self._values
        gradients = e * self._values + 4 * self._head_values
        rows_copy = e * self._values if self._stream_width != e else 0
        head_copy = e * self._head_values if self._autocast else 0
        return self._parts(
            gradients=self._gradients_before(),
            activations=self._activations(),
            autocast_copies=self._weight_copies() + rows_copy + head_copy,
            loss=hidden + gradients + self._chunk(),
        )

    def _chunk(self) -> int:
        """A chunk's logits with what is computed from them, or their gradient beside the chunk's
        part of the head's gradient."""
        rows = min(self.chunk_rows, self.tokens)
        logits, e = rows * self.model.vocab_size, self.width
        eager = 16 if self._gpt2 else 20
        share = e * self._head_values if self._autocast else 0
        return max((2 * e if self.compiled else eager) * logits, e * logits + share)

    def _at_loss_backward(self) -> dict[str, int]:
        e, stream, head = self.width, self._stream_width, 4 * self._head_values
        converted = stream if stream != e else 0
        rows_first = (2 * e + converted) * self._values + head
        head_next = (e + stream) * self._values + 2 * head
        return self._parts(
            gradients=self._gradients_before(),
            activations=self._activations(),
            autocast_copies=0 if self.checkpointed else self._weight_copies(),
            loss=max(rows_first, head_next),
        )

    def _at_backward(self) -> dict[str, int]:
        # The widest gradients in a block are those around its non-linearity; ReLU squared allocates
        # three temporaries of that size unless it is compiled.
        e = self.width
        square = 12 * e + self._stream_width - 4
        around = 4 * e if self._gpt2 or self.compiled else square
        # A tied head's gradient waits for the embedding's; otherwise it may be a gradient already.
        head_waits = self.parameters.tied or not self.accumulates
        return self._parts(
            gradients=self._gradients_before(),
            activations=self._activations() + (self._block() if self.checkpointed else 0),
            autocast_copies=0 if self.checkpointed else self._weight_copies(),
            loss=4 * self._head_values if head_waits else 0,
            temporaries=around * self._values,
        )

    def _at_embedding(self) -> dict[str, int]:
        head = 4 * self._head_values
        embedding_is_new = 0 if self.accumulates else head
        blocks = 4 * self.parameters.in_blocks
        reduced = 0 if self.accumulates else blocks - self._share(blocks)
        return self._parts(
            gradients=4 * self.parameters.total - embedding_is_new - reduced,
            activations=24 * self.tokens + self._stream_width * self._values,
            temporaries=3 * head if self.parameters.tied else head,
        )

    def _at_update(self) -> dict[str, int]:
        # Muon updates one matrix at a time: the momentum update in float32, and in bfloat16 the
        # matrix, its products and the next iterate. Fused AdamW works in place.
        largest_matrix = 4 * self.model.n_embd**2
        return self._parts(
            weights=self._share(4 * self.parameters.total),
            gradients=self._share(4 * self.parameters.total),
            temporaries=9 * largest_matrix if self.muon else 0,
        )

    def evaluation_bytes(self, batch_size: int) -> int:
        """Peak of an evaluation: there are no gradients and autograd saves nothing."""
        tokens = batch_size * self.model.block_size
        values, e = tokens * self.model.n_embd, self.width
        forward = (16 + 8 * e if self._gpt2 else 12 * e) * values
        logits = min(self.chunk_rows, tokens) * self.model.vocab_size
        rows_copy = e if self._stream_width != e else 0
        head_copy = e * self._head_values if self._autocast else 0
        # gpt2: logits and logsumexp's copy. nanochat: logits before, during and after the tanh cap.
        loss = (8 if self._gpt2 else 12) * logits + (self._stream_width + rows_copy) * values
        standing = self._weights() + self._optimizer_states() + 24 * tokens
        return standing + self._weight_copies() + max(forward, loss + head_copy)
