"""One optimizer step on the device: micro-batches that fit into its memory, then one update.

Between the micro-batches of a step nothing waits for the device. A step that does not fit is done
again in smaller micro-batches, over the same sequences.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.loader import Batch, SequenceDataset, TrainingLoader
from gpt.errors import OutOfMemoryError, Problem
from gpt.evaluation.heldout import HeldoutLoss, heldout_loss
from gpt.hardware.device import autocast, compute_dtype, is_out_of_memory
from gpt.model.architectures import build_model
from gpt.model.base import GPT
from gpt.model.compile import compile_if_supported
from gpt.model.io import load_tensors
from gpt.model.loss import linear_cross_entropy
from gpt.preflight.sharding import choose_sharding
from gpt.training.checkpoint.format import get_random_states, load_checkpoint, set_random_states
from gpt.training.checkpoint.retention import TrainingProgress
from gpt.training.distributed.process_group import SINGLE_PROCESS, ProcessGroup, local_device
from gpt.training.distributed.sharding import (
    gradient_sync,
    keeps_gradient_buckets,
    load_full_weights,
    replicate,
    reshard,
    shard,
    whole,
)
from gpt.training.optimizer import build_optimizers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gradients:
    """What a step's micro-batches came to. `loss` is the mean over its tokens, nats; `norm` the
    global norm of its gradient before clipping."""

    loss: float
    norm: float
    usable: bool
    """Whether the update may be made: both numbers are finite, or float16 overflowed, for which the
    scaler skips the update by itself and lowers its scale."""


def build_initial_model(config: RunConfig) -> GPT:
    """The network before step 1, on the CPU, so that every device begins with the same weights:
    drawn from torch's generator, or those of `training.init_from`. Raises `CheckpointError`."""
    model = build_model(config.model)
    if named := config.training.init_from:
        model.load_state_dict(load_tensors(Path(named), config.model))
    return model


class SmallerBatchNeeded(Exception):  # noqa: N818 - the group starts again by it
    """A process of a group ran out of memory; none of them can do a step by itself again."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(f"out of memory: batch_size {batch_size} is tried")
        self.batch_size = batch_size


class Stepper:
    """Network, optimizers and data of a run, new from the seed. In a group each process takes its
    share of a step's micro-batches. `batch_size` is the micro-batch that fitted before."""

    def __init__(
        self,
        config: RunConfig,
        dataset: DatasetManifest,
        group: ProcessGroup = SINGLE_PROCESS,
        batch_size: int | None = None,
    ) -> None:
        self.config, self.dataset, self.group = config, dataset, group
        self.device = local_device(config.hardware.device)
        self.batch_size = self._first_batch_size(batch_size)
        if self.on_gpu:
            torch.set_float32_matmul_precision("high")  # TF32 where products stay in float32
        torch.manual_seed(config.training.seed)
        self.model = build_initial_model(config).to(self.device)
        self.model.activation_checkpointing = config.training.activation_checkpointing
        self.spread = self._spread_over_group()
        self.network = self._compiled(self.spread)
        self.optimizers = build_optimizers(self.model, config)
        # Gradients in float16 vanish unless scaled; the other types need no scaler.
        scaled = compute_dtype(self.device, config.training.dtype) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        sequences = SequenceDataset(dataset, dataset.train, config.model.block_size)
        self.batches = TrainingLoader(sequences, config.training.seed)
        self._draw_own_dropout(0)
        self.consistent = True
        """False in the middle of an update: weights and states are of no step then."""

    def _first_batch_size(self, fitted: int | None) -> int:
        """What fitted before, unless the config has changed to where it is no part of a step."""
        wanted, parts = self.config.training.batch_size, self._sequences_each
        return fitted if fitted and fitted < wanted and parts % fitted == 0 else wanted

    @property
    def _sequences_each(self) -> int:
        """Of a step, for each process of the group."""
        return self.config.sequences_per_step // self.group.size

    def restart(self, dataset_fingerprint: str) -> TrainingProgress:
        """Weights, states and data order as `__init__` left them; the progress of that."""
        torch.manual_seed(self.config.training.seed)
        load_full_weights(self.model, build_initial_model(self.config).state_dict())
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self._draw_own_dropout(0)
        return TrainingProgress(
            step=0,
            position=0,
            tokens_seen=0,
            finished=False,
            dataset_fingerprint=dataset_fingerprint,
        )

    def resume(self, checkpoint: Path, dataset_fingerprint: str) -> TrainingProgress:
        """Weights, states and random states of a checkpoint. Raises `CheckpointError`."""
        progress = load_checkpoint(
            checkpoint, self.config, dataset_fingerprint, self.model, self.optimizers
        )
        self.scaler.load_state_dict(progress.scaler)
        self._draw_own_dropout(progress.step)
        return progress

    def _draw_own_dropout(self, step: int) -> None:
        """The leader goes on with the run's random state, the others with states of their own."""
        if not self.group.is_main_process:
            torch.manual_seed(hash((self.config.training.seed, step, self.group.rank)) % 2**63)

    def _spread_over_group(self) -> torch.nn.Module:
        if self.group.alone:
            return self.model
        memory_bytes = None
        if self.on_gpu:
            memory_bytes = torch.cuda.get_device_properties(self.device).total_memory
        if choose_sharding(self.config, memory_bytes) == "fsdp":
            shard(self.model, self.group)
            return self.model
        return replicate(self.model)

    def _compiled(self, network: torch.nn.Module) -> torch.nn.Module:
        # On a CPU the head dominates small models, and compiling the rest takes longer than it
        # saves in the minutes that a CPU run lasts.
        if self.config.training.compile and self.on_gpu:
            return compile_if_supported(network, self.device)
        return network

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    # --- one step --------------------------------------------------------------------------------

    def gradients(self, stop: Callable[[], bool]) -> Gradients | None:
        """Of the next `sequences_per_step` sequences, clipped; None, with nothing taken, where
        `stop` turned true between two micro-batches. Waits once for the device, at the end."""
        position, random = self.batches.position, get_random_states()
        while True:
            try:
                loss = self._accumulated(stop)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: its traceback would keep the step's tensors alive.
            self._take_smaller_batches("in training")
            self._go_back(position, random)
        if loss is None:
            self.drop_gradients()
            self._go_back(position, random)
            return None
        return self._clipped(loss)

    def _accumulated(self, stop: Callable[[], bool]) -> Tensor | None:
        loss = torch.zeros((), device=self.device)
        count, group = self.config.sequences_per_step // self.batch_size, self.group
        for index in range(count):
            if stop():
                return None
            if index % group.size != group.rank:
                self.batches.skip(self.batch_size)
                continue
            with gradient_sync(self.spread, index + group.size >= count):
                loss += self.micro_step(self.batches.next_batch(self.batch_size))
        return group.all_reduce_sum(loss)

    def micro_step(self, batch: Batch) -> Tensor:
        """Add the gradients of one micro-batch; its share of the step's mean loss."""
        inputs, targets = (self._to_device(part) for part in batch)
        with autocast(self.device, self.config.training.dtype):
            summed = linear_cross_entropy(
                self.network(inputs),
                self.model.head,
                targets,
                self.model.logit_softcap,
                self.config.training.loss_chunk_rows,
                self.config.training.compile,
            )
        # Over the tokens of the whole step, so that micro-batches of any split weigh the same.
        share = summed / self.config.tokens_per_step
        # Times their number, because a group's gradients are averaged over its processes.
        self.scaler.scale(share * self.group.size).backward()
        return share.detach()

    def _clipped(self, summed: Tensor) -> Gradients:
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.config.optimizer.grad_clip or float("inf")
        gradient_norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        # The one place where a step waits: what is wrong must be known before the update.
        loss, norm = torch.stack((summed, gradient_norm.to(summed.dtype))).tolist()
        usable = math.isfinite(loss) and (math.isfinite(norm) or self._overflow_is_expected())
        return Gradients(loss, norm, usable)

    def _overflow_is_expected(self) -> bool:
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def update(self) -> None:
        """One step of the optimizers with the gradients that are there; on a GPU this returns
        before it is done."""
        self.consistent = False
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.drop_gradients()
        self.consistent = True

    def drop_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not keeps_gradient_buckets(self.spread))

    def weights_are_finite(self) -> bool:
        """Waits for the device."""
        norm = torch.nn.utils.get_total_norm([p.detach() for p in self.model.parameters()])
        return bool(whole(norm).isfinite())

    def heldout(self, config: RunConfig, tokens: int | None = None) -> HeldoutLoss:
        """Every process of a group evaluates all of it: it is short, and each must know."""
        held = heldout_loss(self.model, config, self.dataset, tokens)
        reshard(self.model)
        return held

    def _to_device(self, part: Tensor) -> Tensor:
        # From pinned memory the copy runs beside the work that is already enqueued.
        return part.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else part

    def _go_back(self, position: int, random: dict[str, Tensor]) -> None:
        self.batches.position = position
        set_random_states(random)

    # --- fitting into memory ---------------------------------------------------------------------

    def fit(self) -> None:
        """Before any work counts: two micro-steps, an update and an evaluation at full size, in
        smaller micro-batches until they fit. Leaves no trace in weights, states or data order."""
        position, random = self.batches.position, get_random_states()
        while True:
            try:
                self._trial()
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._take_smaller_batches("in the trial before the first step")
        self._go_back(position, random)

    def _trial(self) -> None:
        fresh = not any(optimizer.state for optimizer in self.optimizers)
        self.consistent = not fresh
        self.micro_step(self.batches.next_batch(self.batch_size))
        if fresh:
            self._allocate_optimizer_states()
        # The second stands at the peak of every later one: gradients and optimizer states exist.
        self.micro_step(self.batches.next_batch(self.batch_size))
        self.drop_gradients()
        self.heldout(self._one_evaluation_batch())
        if fresh:
            for optimizer in self.optimizers:
                optimizer.state.clear()
        self.consistent = True

    def _allocate_optimizer_states(self) -> None:
        """An update of nothing: learning rate 0 and gradients 0."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    parameter.grad.zero_()
            optimizer.step()

    def _one_evaluation_batch(self) -> RunConfig:
        tokens = self.config.evaluation.batch_size * self.config.model.block_size
        evaluation = self.config.evaluation.model_copy(update={"tokens": tokens})
        return self.config.model_copy(update={"evaluation": evaluation})

    def _take_smaller_batches(self, where: str) -> None:
        """At most half the micro-batch, the tokens of a step unchanged; raises `OutOfMemoryError`
        when it was one sequence already."""
        self.drop_gradients()
        if self.on_gpu:
            torch.cuda.empty_cache()
        before, total = self.batch_size, self.config.sequences_per_step
        if before == 1:
            raise OutOfMemoryError(
                Problem(
                    "training.batch_size",
                    "1",
                    f"{self.device} ran out of memory {where} with one sequence at a time",
                    "set training.activation_checkpointing = true or a smaller "
                    "training.loss_chunk_rows, or train a smaller model or model.block_size",
                )
            )
        self.batch_size = next(
            b for b in range(before // 2, 0, -1) if self._sequences_each % b == 0
        )
        logger.warning(
            "out of memory %s: batch_size %d -> %d, grad_acc %d -> %d; the tokens of a step and "
            "their order stay the same",
            where,
            before,
            self.batch_size,
            total // before,
            total // self.batch_size,
        )
        if not self.group.alone:
            raise SmallerBatchNeeded(self.batch_size)
