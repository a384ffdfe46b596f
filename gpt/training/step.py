"""What one optimizer step changes: model, optimizers, gradient scaler and position in the data.

Nothing waits for the device between the micro-batches of a step; `clip_gradients` waits once.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt.artifacts import CheckpointRef, DatasetManifest, HeldoutLoss
from gpt.config.schema import RunConfig
from gpt.data.loader import Batch, SequenceDataset, TrainingLoader
from gpt.evaluation.heldout import heldout_loss
from gpt.hardware.device import autocast, compute_dtype
from gpt.model.architectures import build_model
from gpt.model.base import GPT
from gpt.model.compile import compile_if_supported
from gpt.model.io import load_tensors
from gpt.model.loss import linear_cross_entropy
from gpt.training.checkpoint.format import load_checkpoint
from gpt.training.checkpoint.retention import TrainingProgress
from gpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup, local_device
from gpt.training.distributed.sharding import (
    apply_ddp,
    apply_fsdp,
    full_tensor,
    load_full_weights,
    reshard,
    set_gradient_sync,
)
from gpt.training.optimizer import build_optimizers


def build_initial_model(config: RunConfig) -> GPT:
    """Build the model before step 1 on the CPU, so that every device starts with the same weights:
    random ones from torch's generator, or those of `training.init_from`. Raises `CheckpointError`.
    """
    model = build_model(config.model)
    if path := config.training.init_from:
        model.load_state_dict(load_tensors(Path(path), config.model))
    return model


START = TrainingProgress(step=0, position=0, tokens_seen=0, finished=False, dataset_fingerprint="")


class TrainState:
    """The state of a run: before its first step when built, of a checkpoint after `resume`.

    In a process group, each process holds its own state and takes its share of the micro-batches
    of a step. `batch_size` is a micro-batch that fitted into memory before, in sequences.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: DatasetManifest,
        group: ProcessGroup = SINGLE_PROCESS,
        batch_size: int | None = None,
    ) -> None:
        self.config, self.dataset, self.group = config, dataset, group
        self.device = local_device(config.hardware.device)
        self.batch_size = self._initial_batch_size(batch_size)
        if self.on_gpu:
            torch.set_float32_matmul_precision("high")  # TF32 for products that stay in float32
        torch.manual_seed(config.training.seed)
        self.model = build_initial_model(config).to(self.device)
        self.model.activation_checkpointing = config.training.activation_checkpointing
        self.parallel_model = self._parallelize()
        self.compiled_model = self._compile()
        self.optimizers = build_optimizers(self.model, config)
        sequences = SequenceDataset(dataset, dataset.train, config.model.block_size)
        self.loader = TrainingLoader(sequences, config.training.seed)
        self.evaluated_step: int | None = None
        self.is_consistent = True
        """False during an update, when weights and optimizer states belong to no step."""
        self._set_progress(START)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def tokens_seen(self) -> int:
        return self.step * self.config.tokens_per_step

    @property
    def sequences_per_process(self) -> int:
        """Sequences of one step in each process."""
        return self.config.sequences_per_step // self.group.world_size

    def _initial_batch_size(self, fitted: int | None) -> int:
        """Return what fitted before, unless it no longer divides a step of the config."""
        configured = self.config.training.batch_size
        usable = fitted and fitted < configured and self.sequences_per_process % fitted == 0
        return fitted if fitted and usable else configured

    def _parallelize(self) -> nn.Module:
        if not self.group.is_distributed:
            return self.model
        if self.config.hardware.sharding == "fsdp":
            apply_fsdp(self.model, self.group)
            return self.model
        return apply_ddp(self.model)

    def _compile(self) -> nn.Module:
        # On a CPU the head dominates small models, and compiling the rest takes longer than it
        # saves in the minutes that a CPU run lasts.
        if self.config.training.compile and self.on_gpu:
            return compile_if_supported(self.parallel_model, self.device)
        return self.parallel_model

    def _seed_dropout(self, step: int) -> None:
        """Give every process but the main one, which has the run's, a random state of its own."""
        if not self.group.is_main_process:
            torch.manual_seed(hash((self.config.training.seed, step, self.group.rank)) % 2**63)

    # --- checkpoints -----------------------------------------------------------------------------

    def resume(self, checkpoint: CheckpointRef) -> None:
        """Load a checkpoint. Raises `CheckpointError` if it belongs to another run."""
        progress = load_checkpoint(
            checkpoint.folder, self.config, self.dataset.fingerprint, self.model, self.optimizers
        )
        self._set_progress(progress)

    def restart(self) -> None:
        """Go back to the state before step 1."""
        torch.manual_seed(self.config.training.seed)
        load_full_weights(self.model, build_initial_model(self.config).state_dict())
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self._set_progress(START)

    def _set_progress(self, progress: TrainingProgress) -> None:
        # float16 gradients underflow unless scaled; other types need no scaler.
        is_float16 = compute_dtype(self.device, self.config.training.dtype) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_float16)
        if progress.scaler:  # empty if the checkpoint comes from a device with another type
            self.scaler.load_state_dict(progress.scaler)
        self.loader.position = progress.position
        self.step = self.saved_step = progress.step
        self.skipped_steps, self.recent_losses = progress.skipped_steps, progress.recent_losses
        self._seed_dropout(self.step)

    def progress(self) -> TrainingProgress:
        """Return what a checkpoint holds besides tensors."""
        return TrainingProgress(
            step=self.step,
            position=self.loader.position,
            tokens_seen=self.tokens_seen,
            finished=self.step == self.config.training.max_steps,
            dataset_fingerprint=self.dataset.fingerprint,
            scaler=self.scaler.state_dict(),
            skipped_steps=self.skipped_steps,
            recent_losses=self.recent_losses,
        )

    # --- one step --------------------------------------------------------------------------------

    def micro_batches(self) -> Iterator[tuple[Batch, bool]]:
        """Yield this process's micro-batches of one step, each with whether it is the last."""
        count, world_size = self.config.sequences_per_step // self.batch_size, self.group.world_size
        for index in range(count):
            if index % world_size == self.group.rank:
                yield self.loader.next_batch(self.batch_size), index + world_size >= count
            else:
                self.loader.skip(self.batch_size)

    def forward_backward(self, batch: Batch, sync_gradients: bool = True) -> Tensor:
        """Add the gradients of one micro-batch; return its part of the mean loss of the step.

        With `sync_gradients`, the gradients of all processes are averaged after the backward pass.
        """
        inputs, targets = (self._to_device(part) for part in batch)
        set_gradient_sync(self.parallel_model, sync_gradients)
        with autocast(self.device, self.config.training.dtype):
            loss_sum = linear_cross_entropy(
                self.compiled_model(inputs),
                self.model.head,
                targets,
                self.model.logit_softcap,
                self.config.training.loss_chunk_rows,
                self.config.training.compile,
            )
        # Over the tokens of the whole step, so that all micro-batches weigh the same.
        loss = loss_sum / self.config.tokens_per_step
        # Times their number, because gradients are averaged over the processes.
        self.scaler.scale(loss * self.group.world_size).backward()
        return loss.detach()

    def clip_gradients(self, loss: Tensor) -> tuple[float, float]:
        """Clip the global norm of the gradients to `optimizer.grad_clip`, and adapt their scale.

        Returns the mean loss over all processes, in nats, and the norm before clipping. This is the
        one place where a step waits for the device: both must be known before the update. If the
        norm is not finite, clipping spoils all gradients, so no optimizer may step; the scaler
        would let those step whose own gradients were finite.
        """
        self.group.all_reduce_sum(loss)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.scaler.update()
        max_norm = self.config.optimizer.grad_clip or float("inf")
        norm = full_tensor(nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))
        loss_value, norm_value = torch.stack((loss, norm.to(loss.dtype))).tolist()
        return loss_value, norm_value

    def scale_was_too_large(self) -> bool:
        """Whether a gradient that is not finite is a float16 overflow, for which the scale has just
        been lowered; one at a scale below 1 has another cause."""
        return (
            self.scaler.is_enabled() and self.scaler.get_scale() >= self.scaler.get_backoff_factor()
        )

    def update_weights(self) -> None:
        """Step the optimizers; on a GPU this returns before the update is done."""
        self.is_consistent = False
        for optimizer in self.optimizers:
            optimizer.step()
        self.zero_grad()
        self.is_consistent = True

    def skip_update(self) -> None:
        """Drop the gradients and count the step as skipped."""
        self.zero_grad()
        self.skipped_steps += 1

    def zero_grad(self) -> None:
        # DDP's gradients are views of its buckets: setting them to None would allocate others.
        is_ddp = isinstance(self.parallel_model, DistributedDataParallel)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not is_ddp)

    def _to_device(self, part: Tensor) -> Tensor:
        # From pinned memory the copy runs beside work that is already enqueued.
        return part.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else part

    # --- between steps ---------------------------------------------------------------------------

    def evaluate(self, tokens: int | None = None) -> HeldoutLoss:
        """Compute the loss on the first validation tokens, all of them in every process."""
        if tokens is None:
            evaluation = self.config.evaluation
            tokens = min(evaluation.tokens, evaluation.interval_tokens)
            self.evaluated_step = self.step
        loss = heldout_loss(self.model, self.config, self.dataset, tokens)
        reshard(self.model)
        return loss

    def weights_are_finite(self) -> bool:
        """Whether all weights are finite; waits for the device."""
        norm = nn.utils.get_total_norm([p.detach() for p in self.model.parameters()])
        return bool(full_tensor(norm).isfinite())
