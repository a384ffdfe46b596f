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
- nanochat: the inputs of the norms (e C each: two on the stream, one each for queries and keys),
  the inputs of the linear layers (e C, e C, e C, 4 e C), queries, keys, values and attention's
  output (4 e C), ReLU's output (4 e C); logsumexp and deviations (8 + 12 H).
No tokens x tokens matrix exists. FlashAttention (Dao 2023, arXiv:2307.08691) lays its output out
like the queries. Those of nanochat lie head by head, so that the output projection saves a copy;
memory-efficient attention (Rabe and Staats 2021, arXiv:2112.05682) writes token by token, and its
output is the projection's input. Heads whose rows are no multiple of 16 bytes are padded, and the
padded copies are saved. Autocast caches 16-bit copies of all block matrices, and one of the head
while the loss is computed. Activation checkpointing saves the input of each block and recomputes
one block at a time. Dropout saves one byte per element. The method is that of Korthikanti et al.
2022 (arXiv:2205.05198).

`peak_bytes` is for a step without compilation. With compilation (`compiled_bytes`), of a chunk only
the logits and their gradient exist; what follows the embedding is computed again in backward, which
saves nanochat's first norm input and the first block's input with checkpointing; and checkpointing
saves no 16-bit weights. Tests hold both within 2% of `torch.cuda.max_memory_allocated`
(tests/cuda/test_preflight_memory.py), and `peak_bytes` within 10% of what
`torch.distributed._tools.mem_tracker.MemTracker` counts without a GPU: a CPU runs nanochat's norms
in several operations.

`overheads` are not in that measurement and are assumed: the CUDA context with the code of cuBLAS
and cuDNN, about 0.5 GB; memory that torch's caching allocator holds unused, 4% with expandable
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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gpt.config.schema import RunConfig
from gpt.hardware.gpus import MIB, GPUSpec
from gpt.hardware.target_gpu import TargetGPU, find_target_gpu
from gpt.preflight.parameters import count_parameters

Sharding = Literal["ddp", "fsdp"]
Attention = Literal["FlashAttention", "memory-efficient"]
"""The kernel that torch chooses for attention."""

CUDA_CHUNK_ROWS = 2048
CPU_CHUNK_ROWS = 512
CUDA_CONTEXT_BYTES = 500 * MIB
COMPILED_BUFFERS_BYTES = 100 * MIB
ALLOCATOR_SHARE = 0.04
MAX_FLASH_HEAD_SIZE = 256


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
    loss_chunk_rows: int
    """Tokens whose logits exist at once."""
    attention: Attention

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def needed_bytes(self) -> int:
        """Memory that the device must have, overheads included."""
        return max(self.compiled_bytes, self.evaluation_bytes) + sum(self.overheads.values())


def estimate_memory(
    config: RunConfig, sharding: Sharding = "ddp", gpu: GPUSpec | None = None
) -> Memory:
    """Estimate the peak memory of training and evaluation on one of the config's GPUs, or on a CPU
    if the config asks for one.

    `sharding` matters with several devices only. `gpu` decides on the attention kernel; an unknown
    one is taken for Ampere or later. Without bfloat16 a GPU computes in float16, which is as wide.
    """
    on_cpu = config.hardware.device == "cpu"
    step = _Step(config, sharding, gpu, compiled=False)
    moment, parts = step.peak()
    # On a CPU only the loss is compiled, and memory is not judged.
    compiled = config.training.compile and not on_cpu
    compiled_parts = _Step(config, sharding, gpu, compiled=True).peak()[1] if compiled else parts
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
        loss_chunk_rows=step.chunk_rows,
        attention=step.attention,
    )


def choose_sharding(config: RunConfig, gpu: TargetGPU) -> Sharding:
    """Return what `hardware.sharding` asks for; for "auto" ddp if it fits or needs less, else fsdp.
    If the device's memory is unknown, or it is a CPU, "auto" is ddp."""
    hardware = config.hardware
    if hardware.world_size > 1 and hardware.sharding != "auto":
        return hardware.sharding
    if hardware.world_size == 1 or hardware.device == "cpu" or gpu.memory_bytes is None:
        return "ddp"
    ddp = estimate_memory(config, "ddp", gpu.spec).needed_bytes
    fsdp = estimate_memory(config, "fsdp", gpu.spec).needed_bytes
    return "ddp" if ddp <= max(fsdp, gpu.memory_bytes) else "fsdp"


def fits_memory(config: RunConfig, gpu: TargetGPU) -> bool | None:
    """Return whether such a GPU holds its part of the run; None if its memory is unknown."""
    if gpu.memory_bytes is None:
        return None
    memory = estimate_memory(config, choose_sharding(config, gpu), gpu.spec)
    return memory.needed_bytes <= gpu.memory_bytes


def resolve_sharding(config: RunConfig) -> RunConfig:
    """Replace `hardware.sharding = "auto"` by the value that this machine's GPUs call for."""
    if config.hardware.sharding != "auto" or config.hardware.world_size == 1:
        return config
    chosen = choose_sharding(config, find_target_gpu())
    return config.model_copy(
        update={"hardware": config.hardware.model_copy(update={"sharding": chosen})}
    )


class _Step:
    """Sizes in a training step; in bytes unless the name says otherwise."""

    def __init__(
        self, config: RunConfig, sharding: Sharding, gpu: GPUSpec | None, compiled: bool
    ) -> None:
        model, training = config.model, config.training
        on_cpu, world_size = config.hardware.device == "cpu", config.hardware.world_size
        default_rows = CPU_CHUNK_ROWS if on_cpu else CUDA_CHUNK_ROWS
        self.model, self.compiled = model, compiled
        self.parameters = parameters = count_parameters(model)
        self.is_gpt2 = model.architecture == "gpt2"
        self.is_muon = config.optimizer.name == "muon"
        self.is_checkpointed = training.activation_checkpointing
        self.chunk_rows = training.loss_chunk_rows or default_rows
        self.shards = world_size if sharding == "fsdp" else 1
        is_ddp = world_size > 1 and sharding == "ddp"
        self.accumulates = is_ddp or training.grad_acc > world_size
        # Bytes per element: of the matmul dtype (e above), of residual stream and hidden states.
        self.e = 4 if training.dtype == "float32" or on_cpu else 2
        self.stream = 4 if self.is_gpt2 else self.e
        self.head_size = model.n_embd // model.n_head
        is_flash = self.e == 2 and self.head_size <= MAX_FLASH_HEAD_SIZE
        is_flash = is_flash and (gpu is None or gpu.compute_capability >= (8, 0))
        self.attention: Attention = "FlashAttention" if is_flash else "memory-efficient"
        self.is_autocast = self.e == 2
        self.tokens = training.batch_size * model.block_size
        self.elements = self.tokens * model.n_embd
        self.head_elements = model.vocab_size * model.n_embd
        self.head = 4 * self.head_elements
        self.all_parameters = 4 * parameters.total
        self.optimizer_states = self.shard(4 * parameters.optimizer_states(config.optimizer.name))
        has_copies = self.is_autocast and not (compiled and self.is_checkpointed)
        self.block_copies = 2 * parameters.block_matrices if has_copies else 0
        # Gradients during a forward pass: the sum over the micro-batches before it.
        self.earlier_gradients = self.all_parameters if self.accumulates else 0
        self.block = self._block()
        self.activations = self._activations()

    def shard(self, size: int) -> int:
        """One device's share of something that fsdp shards."""
        return -(-size // self.shards)

    def weights(self) -> int:
        """With fsdp the device's share, plus what is gathered."""
        if self.shards == 1:
            return self.all_parameters
        total, blocks, layers = self.parameters.total, self.parameters.in_blocks, self.model.n_layer
        gathered = total - blocks + min(2, layers) * blocks // layers
        return self.shard(self.all_parameters) + 4 * gathered

    def _block(self) -> int:
        """What autograd saves for one block."""
        model, heads, e = self.model, self.model.n_head, self.e
        padding = -self.head_size % (16 // e)
        # Queries, keys and values; attention's output too, unless the projection takes it uncopied.
        is_copied = padding or (not self.is_gpt2 and self.attention == "FlashAttention")
        attention = (4 if is_copied else 3) * e * heads * (self.head_size + padding)
        if self.is_gpt2:
            saved, per_token = 8 + 11 * e, 16 + 4 * heads
        else:
            saved, per_token = 15 * e, 8 + 12 * heads
        masks = 2 if model.dropout else 0
        return (saved + masks) * self.elements + (attention + per_token) * self.tokens

    def _activations(self) -> int:
        """All that autograd holds at the end of the forward pass."""
        model = self.model
        # Inputs and targets of this micro-batch and inputs of the one before.
        ends = 24 * self.tokens
        # Positions, and what the first and the last norm save.
        if self.is_gpt2:
            masks = self.elements if model.dropout else 0
            ends += 8 * model.block_size + 4 * self.elements + masks
        else:
            rotations = self.e * model.block_size * self.head_size
            ends += rotations + (1 if self.compiled else 2) * self.e * self.elements
        if self.is_checkpointed:
            return ends + (model.n_layer - self.compiled) * self.stream * self.elements
        return ends + model.n_layer * self.block

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

    def _parts(self, **changed: int) -> dict[str, int]:
        """The parts of a moment, in order; those not given are what a step begins with."""
        return {
            "weights": self.weights(),
            "gradients": self.earlier_gradients,
            "optimizer_states": self.optimizer_states,
            **dict.fromkeys(("activations", "autocast_copies", "loss", "temporaries"), 0),
            **changed,
        }

    def _at_loss(self) -> dict[str, int]:
        e = self.e
        rows_copy = e * self.elements if self.stream != e else 0
        head_copy = e * self.head_elements if self.is_autocast else 0
        # A chunk's logits with what is computed from them, or their gradient beside the chunk's
        # part of the head's gradient.
        logits = min(self.chunk_rows, self.tokens) * self.model.vocab_size
        per_logit = 2 * e if self.compiled else 16 if self.is_gpt2 else 20
        chunk = max(per_logit * logits, e * logits + head_copy)
        return self._parts(
            activations=self.activations,
            autocast_copies=self.block_copies + rows_copy + head_copy,
            loss=(self.stream + e) * self.elements + self.head + chunk,
        )

    def _at_loss_backward(self) -> dict[str, int]:
        e, stream = self.e, self.stream
        converted = stream if stream != e else 0
        rows_first = (2 * e + converted) * self.elements + self.head
        head_next = (e + stream) * self.elements + 2 * self.head
        return self._parts(
            activations=self.activations,
            autocast_copies=0 if self.is_checkpointed else self.block_copies,
            loss=max(rows_first, head_next),
        )

    def _at_backward(self) -> dict[str, int]:
        # The widest gradients in a block are those around its non-linearity; ReLU squared allocates
        # three temporaries of that size unless it is compiled.
        square = 12 * self.e + self.stream - 4
        around = 4 * self.e if self.is_gpt2 or self.compiled else square
        if self.compiled and self.is_checkpointed:
            # Measured: recomputation overlaps with the backward pass, and so do heads before and
            # after padding.
            around *= 2
            if self.head_size % (16 // self.e):
                around += 3 * self.e
        # A tied head's gradient waits for the embedding's; otherwise it may be a gradient already.
        head_waits = self.parameters.tied or not self.accumulates
        return self._parts(
            activations=self.activations + (self.block if self.is_checkpointed else 0),
            autocast_copies=0 if self.is_checkpointed else self.block_copies,
            loss=self.head if head_waits else 0,
            temporaries=around * self.elements,
        )

    def _at_embedding(self) -> dict[str, int]:
        gradients = self.all_parameters
        if not self.accumulates:  # the embedding's is new, those of the blocks are reduced
            blocks = 4 * self.parameters.in_blocks
            gradients -= self.head + blocks - self.shard(blocks)
        return self._parts(
            gradients=gradients,
            activations=24 * self.tokens + self.stream * self.elements,
            temporaries=3 * self.head if self.parameters.tied else self.head,
        )

    def _at_update(self) -> dict[str, int]:
        # Muon updates one matrix at a time: the momentum update in float32, and in bfloat16 the
        # matrix, its products and the next iterate. Fused AdamW works in place.
        largest_matrix = 4 * self.model.n_embd**2
        share = self.shard(self.all_parameters)
        temporaries = 9 * largest_matrix if self.is_muon else 0
        return self._parts(weights=share, gradients=share, temporaries=temporaries)

    def evaluation_bytes(self, batch_size: int) -> int:
        """Peak of an evaluation: there are no gradients and autograd saves nothing."""
        tokens, e = batch_size * self.model.block_size, self.e
        elements = tokens * self.model.n_embd
        forward = (16 + 8 * e if self.is_gpt2 else 12 * e) * elements
        logits = min(self.chunk_rows, tokens) * self.model.vocab_size
        rows_copy = e if self.stream != e else 0
        head_copy = e * self.head_elements if self.is_autocast else 0
        # gpt2: logits and logsumexp's copy. nanochat: logits before, during and after the tanh cap.
        loss = (8 if self.is_gpt2 else 12) * logits + (self.stream + rows_copy) * elements
        standing = self.weights() + self.optimizer_states + 24 * tokens
        return standing + self.block_copies + max(forward, loss + head_copy)
