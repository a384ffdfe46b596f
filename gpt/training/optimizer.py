"""Parameter groups and their optimizers: every parameter belongs to exactly one group."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from gpt.config.schema import OptimizerSection, RunConfig
from gpt.model.base import GPT
from gpt.schedule import PeakLearningRates, learning_rate_factor, muon_momentum, peak_learning_rates

# AdamW beside Muon, as in the modded-nanogpt speedrun, track 3.
_BETAS_BESIDE_MUON = (0.8, 0.95)
_EPSILON_BESIDE_MUON = 1e-10
_DECAY_BESIDE_MUON = 0.001


def build_optimizers(
    model: GPT, config: RunConfig, device: torch.device | None = None
) -> list[Optimizer]:
    """Build the optimizers of `optimizer.name`.

    adamw: fused AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), weight decay on matrices only.
    muon: Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices inside
    blocks, fused AdamW for embedding, head and vectors.

    `device` is where the updates run (default: the model's device). Each group keeps its peak
    learning rate in `initial_lr`, which `apply_schedule` scales.
    """
    rates = peak_learning_rates(config)
    if config.optimizer.name == "muon":
        on_cpu = (device or model.head.device).type == "cpu"
        optimizers = _muon_and_adamw(model, config.optimizer, rates, on_cpu)
    else:
        optimizers = _adamw(model, config.optimizer, rates)
    for group in _groups(optimizers):
        group["initial_lr"] = group["lr"]
    return optimizers


def apply_schedule(optimizers: Iterable[Optimizer], config: RunConfig, step: int) -> float:
    """Set learning rates and Muon's momentum for `step` (0 is the first); return the learning rate
    of the matrices."""
    max_steps = config.training.max_steps
    factor = learning_rate_factor(config.schedule, step, max_steps)
    for group in _groups(optimizers):
        group["lr"] = group["initial_lr"] * factor
        if "momentum" in group:
            group["momentum"] = muon_momentum(config.optimizer, step, max_steps)
    return peak_learning_rates(config).matrices * factor


def _adamw(model: GPT, optimizer: OptimizerSection, rates: PeakLearningRates) -> list[Optimizer]:
    parameters = list(model.parameters())
    groups = [
        {"params": _matrices(parameters), "weight_decay": optimizer.weight_decay},
        {"params": _vectors(parameters), "weight_decay": 0.0},
    ]
    betas = (optimizer.beta1, optimizer.beta2)
    return [AdamW(_non_empty(groups), lr=rates.matrices, betas=betas, fused=True)]


def _muon_and_adamw(
    model: GPT, optimizer: OptimizerSection, rates: PeakLearningRates, on_cpu: bool
) -> list[Optimizer]:
    in_blocks = _matrices(p for block in model.blocks for p in block.parameters())
    known = {id(parameter) for parameter in (*in_blocks, model.head)}
    others = [p for p in model.parameters() if id(p) not in known]
    groups = [
        {"params": _matrices(others), "lr": rates.embedding, "weight_decay": _DECAY_BESIDE_MUON},
        {"params": [model.head], "lr": rates.head, "weight_decay": _DECAY_BESIDE_MUON},
        {"params": _vectors(others), "lr": rates.head, "weight_decay": 0.0},
    ]
    muon = (Float32Muon if on_cpu else Muon)(
        in_blocks,
        lr=rates.matrices,
        weight_decay=optimizer.weight_decay,
        momentum=optimizer.momentum,
    )
    adamw = AdamW(
        _non_empty(groups), betas=_BETAS_BESIDE_MUON, eps=_EPSILON_BESIDE_MUON, fused=True
    )
    return [muon, adamw]


def _matrices(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.ndim >= 2]


def _vectors(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.ndim < 2]


def _non_empty(groups: list[dict]) -> list[dict]:
    return [group for group in groups if group["params"]]


def _groups(optimizers: Iterable[Optimizer]) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al. 2024, kellerjordan.github.io/posts/muon), which iterates in
    bfloat16, in float32. Few CPUs multiply bfloat16 fast: with 4 layers of width 128 on two cores,
    torch's step takes 0.80 s and this one 0.02 s (docs/benchmarks.md)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are computed before the step"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
        update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameter.shape
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalize(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> Tensor:
    """Bring all singular values of `matrix` (rows, columns) near 1, with `steps` quintic
    Newton-Schulz iterations aX + b(XX')X + c(XX')^2 X."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=epsilon)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
