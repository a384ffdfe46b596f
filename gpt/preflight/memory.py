"""Memory of the card at its fullest, by part: what will be held, counted tensor by tensor.

The model. Five moments can be the fullest; each is counted from what autograd keeps and what the
code in `gpt.model` holds then, and the estimate is the largest.

- loss: the loss of the last micro-batch is being made. Weights, gradients of the micro-batches
  before it, optimizer states, all activations, the gradients of hidden states and head, and one
  chunk's logits with what is made from them.
- handing: the loss hands its two gradients on, scaled, while it still has them.
- backward: the last block is differentiated.
- embedding: a tied matrix gets its two gradients, the head's and the embedding's, added up.
- update: the optimizer's temporaries.

Per token and block, C = n_embd, H = n_head, e = bytes of the type that is multiplied in (2 under
autocast, else 4), autograd keeps
- gpt2: the inputs of both norms (4 C each: the residual stream is float32), what the four linear
  layers multiply (e C, e C, e C, 4 e C), queries, keys and values (3 e C), the input of GELU
  (4 e C); attention's logsumexp (4 H), mean and deviation of both norms (16).
- nanochat: the inputs of the norms in float32 (4 C each for the two of the stream, for queries and
  for keys), what the linear layers multiply (e C, e C, e C, 4 e C), queries, keys, values and
  attention's output (4 e C), ReLU's output (4 e C); logsumexp and deviations (8 + 12 H).
Attention is FlashAttention (Dao 2023, arXiv:2307.08691), so no tokens x tokens matrix exists; its
16-bit kernels on CUDA pad heads to a multiple of 8 channels, and the padded copies are what is
kept. Autocast keeps 16-bit copies of all block matrices, and one of the head while the loss is
made. Activation checkpointing keeps the input of each block and makes one block's rest again.
Dropout keeps a byte a value. This is the accounting of Korthikanti et al. 2022 (arXiv:2205.05198)
for our own layers.

`peak_bytes` is what a step holds that is not compiled, the figure that
`torch.distributed._tools.mem_tracker.MemTracker` gives under fake tensors (tests hold it within
10% of that) and `torch.cuda.max_memory_allocated` on a card. Compiled, nanochat's norms keep their
inputs in the type that is multiplied in, and of a chunk only its logits and their gradient exist:
`compiled_bytes`.

What lies on top is not measured by either, and assumed: `overheads`. The CUDA context with
cuBLAS's and cuDNN's code, some 0.5 GB; what torch's caching allocator holds without use, 4% with
expandable segments; buffers of compiled graphs. The verdict on a card is on the sum.

Of many devices (`Layout`) each holds this for its own micro-batches, and
- ddp: gradients through the whole step, because the buckets that are exchanged are the gradients
  (torch's DistributedDataParallel with gradient_as_bucket_view=True; without it, or where gradients
  are dropped between steps and not zeroed, the buckets are as much again);
- fsdp (torch's fully_shard, each block and then the rest): its share of weights, optimizer states
  and exchanged gradients, and gathered in float32 two blocks, the one at work and the next, and
  what is outside the blocks, which stays gathered from forward to backward (the default for the
  root). Gradients are whole while several micro-batches are summed, because they are exchanged
  after the last (set_requires_gradient_sync). Autocast's copies are not shared out.
What NCCL itself allocates is not counted: nobody has measured it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpt.config.schema import ModelSection, RunConfig
from gpt.hardware.gpus import MIB
from gpt.preflight.layout import ONE_DEVICE, Layout
from gpt.preflight.parameters import Parameters, count_parameters

CUDA_CHUNK_ROWS = 2048
CPU_CHUNK_ROWS = 512
CUDA_CONTEXT_BYTES = 500 * MIB
COMPILED_BUFFERS_BYTES = 100 * MIB
ALLOCATOR_SHARE = 0.04


@dataclass(frozen=True)
class Memory:
    """What one card holds when it is fullest. `parts` add up to `peak_bytes`."""

    moment: str
    parts: Mapping[str, int]
    compiled_bytes: int
    """The peak when compiled; the same where nothing is compiled."""
    overheads: Mapping[str, int]
    evaluation_bytes: int
    """Peak of an evaluation during training, at its own batch size, not compiled."""
    chunk_rows: int
    """Rows whose logits exist at once."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """What the card must have, overheads included."""
        return max(self.compiled_bytes, self.evaluation_bytes) + sum(self.overheads.values())


def estimate_memory(config: RunConfig, layout: Layout = ONE_DEVICE) -> Memory:
    """Peak memory of training and evaluation on one GPU of a layout; on a CPU where the config
    names that.

    The card does not matter: one without bfloat16 computes in float16, which is as wide.
    """
    on_cpu = config.hardware.device == "cpu"
    step = _Step.of(config, compiled=False, layout=layout)
    moment, parts = step.fullest()
    # A CPU compiles the loss alone, and its memory is not judged.
    compiled = config.training.compile and not on_cpu
    compiled_parts = _Step.of(config, True, layout).fullest()[1] if compiled else parts
    compiled_bytes = sum(compiled_parts.values())
    return Memory(
        moment=moment,
        parts=parts,
        compiled_bytes=compiled_bytes,
        overheads={} if on_cpu else _overheads(compiled_bytes, compiled),
        evaluation_bytes=step.evaluation_bytes(config.evaluation.batch_size),
        chunk_rows=step.chunk_rows,
    )


def _overheads(peak_bytes: int, compiled: bool) -> dict[str, int]:
    return {
        "cuda_context": CUDA_CONTEXT_BYTES,
        "allocator": round(ALLOCATOR_SHARE * peak_bytes),
        "compiled_buffers": COMPILED_BUFFERS_BYTES if compiled else 0,
    }


@dataclass(frozen=True)
class _Step:
    """The sizes that a training step is made of. What has no unit in its name is bytes."""

    model: ModelSection
    parameters: Parameters
    tokens: int
    """Of one micro-batch."""
    chunk_rows: int
    width: int
    """Bytes of the type that is multiplied in: e above."""
    optimizer_states: int
    muon: bool
    accumulates: bool
    checkpointed: bool
    compiled: bool
    layout: Layout

    @classmethod
    def of(cls, config: RunConfig, compiled: bool, layout: Layout) -> _Step:
        training, on_cpu = config.training, config.hardware.device == "cpu"
        parameters = count_parameters(config.model)
        muon = config.optimizer.name == "muon"
        default_rows = CPU_CHUNK_ROWS if on_cpu else CUDA_CHUNK_ROWS
        # AdamW keeps two float32 numbers a parameter, Muon one.
        kept_once = parameters.block_matrices if muon else 0
        return cls(
            model=config.model,
            parameters=parameters,
            tokens=training.batch_size * config.model.block_size,
            chunk_rows=training.loss_chunk_rows or default_rows,
            width=4 if training.dtype == "float32" or on_cpu else 2,
            optimizer_states=layout.share(4 * (2 * parameters.total - kept_once)),
            muon=muon,
            accumulates=layout.holds_gradients or training.grad_acc > layout.devices,
            checkpointed=training.activation_checkpointing,
            compiled=compiled,
            layout=layout,
        )

    def fullest(self) -> tuple[str, dict[str, int]]:
        """The moment of the peak and its parts."""
        moments = {
            "loss": self._at_loss(),
            "handing": self._at_handing(),
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
        """Bytes of one value of the residual stream and of the hidden states."""
        return 4 if self._gpt2 else self.width

    @property
    def _norm_width(self) -> int:
        """Bytes in which nanochat's norms keep their inputs: not compiled they are made of parts
        that work in float32."""
        return self.width if self.compiled else 4

    @property
    def _values(self) -> int:
        """Values in one tensor of hidden states."""
        return self.tokens * self.model.n_embd

    @property
    def _head_values(self) -> int:
        return self.model.vocab_size * self.model.n_embd

    def _block(self) -> int:
        """What autograd keeps of one block."""
        heads, e = self.model.n_head, self.width
        if self._gpt2:
            kept, small = 8 + 14 * e, 16 + 4 * heads
        else:
            kept, small = 4 * self._norm_width + 15 * e, 8 + 12 * heads
        masks = 2 if self.model.dropout else 0
        return (kept + masks) * self._values + small * self.tokens + self._padding()

    def _padding(self) -> int:
        """Four padded copies in place of queries, keys and values; the output is kept as well."""
        head_size = self.model.n_embd // self.model.n_head
        if not self._autocast or head_size % 8 == 0:
            return 0
        padded_values = -(-head_size // 8) * 8 * self.model.n_head * self.tokens
        return self.width * (4 * padded_values - 3 * self._values)

    def _ends(self) -> int:
        """Ids and targets of a micro-batch and the ids before them, positions, and what the first
        and the last norm keep."""
        model, ids = self.model, 24 * self.tokens
        if self._gpt2:
            masks = self._values if model.dropout else 0
            return ids + 8 * model.block_size + 4 * self._values + masks
        rotations = self.width * model.block_size * (model.n_embd // model.n_head)
        return ids + rotations + 2 * self._norm_width * self._values

    def _activations(self) -> int:
        """All that autograd keeps of the network at the end of forward."""
        block = self._stream_width * self._values if self.checkpointed else self._block()
        return self._ends() + self.model.n_layer * block

    def _weight_copies(self) -> int:
        return 2 * self.parameters.block_matrices if self._autocast else 0

    def _gradients_before(self) -> int:
        """Gradients while a micro-batch goes forward: those of the ones before it."""
        return 4 * self.parameters.total if self.accumulates else 0

    def _weights(self) -> int:
        """Of a layout's device: its share, and what is gathered."""
        total, blocks = self.parameters.total, self.parameters.in_blocks
        if not self.layout.shares:
            return 4 * total
        gathered = total - blocks + min(2, self.model.n_layer) * blocks // self.model.n_layer
        return self.layout.share(4 * total) + 4 * gathered

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
            "optimizer_states": self.optimizer_states,
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
        """A chunk's logits with what is made from them; or their slope beside its share of the
        head's gradient."""
        rows = min(self.chunk_rows, self.tokens)
        logits, e = rows * self.model.vocab_size, self.width
        eager = 16 if self._gpt2 else 20
        share = e * self._head_values if self._autocast else 0
        return max((2 * e if self.compiled else eager) * logits, e * logits + share)

    def _at_handing(self) -> dict[str, int]:
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
        # The widest gradients in a block are those around its non-linearity; ReLU squared makes
        # three temporaries of that size where it is not compiled.
        e = self.width
        square = 12 * e + self._stream_width - 4
        around = 4 * e if self._gpt2 or self.compiled else square
        # The head's gradient waits for the embedding's, or is a gradient of its own already.
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
        exchanged = 0 if self.accumulates else blocks - self.layout.share(blocks)
        return self._parts(
            gradients=4 * self.parameters.total - embedding_is_new - exchanged,
            activations=24 * self.tokens + self._stream_width * self._values,
            temporaries=3 * head if self.parameters.tied else head,
        )

    def _at_update(self) -> dict[str, int]:
        # Muon goes from matrix to matrix: the momentum's update in float32, and in bfloat16 the
        # matrix, its products and the next iterate. Fused AdamW works in place.
        largest_matrix = 4 * self.model.n_embd**2
        return self._parts(
            weights=self.layout.share(4 * self.parameters.total),
            gradients=self.layout.share(4 * self.parameters.total),
            temporaries=9 * largest_matrix if self.muon else 0,
        )

    def evaluation_bytes(self, batch_size: int) -> int:
        """Peak of an evaluation: nothing is kept for a gradient, and there is none."""
        tokens = batch_size * self.model.block_size
        values, e = tokens * self.model.n_embd, self.width
        forward = (16 + 8 * e if self._gpt2 else 12 * e) * values
        logits = min(self.chunk_rows, tokens) * self.model.vocab_size
        rows_copy = e if self._stream_width != e else 0
        head_copy = e * self._head_values if self._autocast else 0
        # gpt2: logits beside logsumexp's own copy. nanochat: before, divided and after tanh.
        loss = (8 if self._gpt2 else 12) * logits + (self._stream_width + rows_copy) * values
        standing = self._weights() + self.optimizer_states + 24 * tokens
        return standing + self._weight_copies() + max(forward, loss + head_copy)
