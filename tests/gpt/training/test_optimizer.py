"""Parameter groups, learning rates, momentum and schedules."""

import math

import pytest
import torch

from gpt.config.loading import build_config
from gpt.config.schema import ScheduleSection
from gpt.model.architectures import build_model
from gpt.schedule import learning_rate_factor, muon_momentum, peak_learning_rates
from gpt.training.optimizer import Float32Muon, apply_schedule, build_optimizers, orthogonalize


def config_of(architecture="nanochat", optimizer="muon", model=(), optimizer_keys=(), **training):
    return build_config(
        {
            "run": {"name": "t"},
            "model": {
                "architecture": architecture,
                "n_layer": 2,
                "n_head": 2,
                "n_embd": 16,
                "block_size": 8,
                **dict(model),
            },
            "data": {"source": "unused.parquet"},
            "optimizer": {"name": optimizer, **dict(optimizer_keys)},
            "training": {"batch_size": 1, "grad_acc": 1, "max_steps": 100, **training},
        }
    )


@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_is_in_exactly_one_group(architecture, optimizer, bias):
    config = config_of(architecture, optimizer, model={"bias": bias}.items())
    model = build_model(config.model)
    optimizers = build_optimizers(model, config)
    grouped = [p for o in optimizers for g in o.param_groups for p in g["params"]]
    assert len(grouped) == len(list(model.parameters()))
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}


def test_adamw_decays_only_matrices():
    config = config_of("gpt2", "adamw", model={"bias": True}.items())
    (optimizer,) = build_optimizers(build_model(config.model), config)
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_muon_gets_only_the_matrices_of_the_blocks():
    config = config_of()
    model = build_model(config.model)
    muon, adamw = build_optimizers(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    beside = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert all(name.startswith("layers.") for name in inside)
    assert beside == {"embed_tokens.weight", "lm_head.weight"}


def test_default_learning_rates_scale_with_batch_and_width():
    full = config_of(
        model={"n_embd": 768, "n_head": 12, "block_size": 1024}.items(), batch_size=16, grad_acc=32
    )
    assert full.tokens_per_step == 2**19
    rates = peak_learning_rates(full)
    assert (rates.matrices, rates.embedding, rates.head) == (0.025, 0.7, 0.004)
    quarter = config_of(
        model={"n_embd": 192, "n_head": 12, "block_size": 1024}.items(), batch_size=4, grad_acc=32
    )
    rates = peak_learning_rates(quarter)
    assert rates.matrices == pytest.approx(0.025 / 2)
    assert rates.embedding == pytest.approx(0.7 / 2 * 2)
    least = config_of(model={"n_embd": 768, "n_head": 12}.items())
    assert peak_learning_rates(least).matrices == pytest.approx(0.025 * math.sqrt(1 / 8))


def test_configured_learning_rates_are_not_scaled():
    given = {"learning_rate": 0.1, "embedding_learning_rate": 0.2, "head_learning_rate": 0.3}
    rates = peak_learning_rates(config_of(optimizer_keys=given.items()))
    assert (rates.matrices, rates.embedding, rates.head) == (0.1, 0.2, 0.3)


def test_apply_schedule_sets_learning_rates_and_momentum():
    config = config_of(max_steps=100)
    optimizers = build_optimizers(build_model(config.model), config)
    for step in (0, 5, 99):
        learning_rate = apply_schedule(optimizers, config, step)
        assert learning_rate == optimizers[0].param_groups[0]["lr"]
        factor = learning_rate_factor(config.schedule, step, 100)
        for group in (g for o in optimizers for g in o.param_groups):
            assert group["lr"] == pytest.approx(group["initial_lr"] * factor)
        expected = muon_momentum(config.optimizer, step, 100)
        assert optimizers[0].param_groups[0]["momentum"] == expected
    assert muon_momentum(config.optimizer, 0, 100) == 0.85
    assert muon_momentum(config.optimizer, 10, 100) == pytest.approx(0.95)
    assert muon_momentum(config.optimizer, 5, 100) == pytest.approx(0.90)


class TestSchedule:
    def test_cosine(self):
        schedule = ScheduleSection(warmup_steps=9, min_learning_rate_ratio=0.1)
        factors = [learning_rate_factor(schedule, step, 100) for step in range(100)]
        assert factors[:9] == pytest.approx([(i + 1) / 10 for i in range(9)])
        assert factors[9] == 1
        assert factors[9:] == sorted(factors[9:], reverse=True)
        middle = 9 + (100 - 9) / 2
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (54 - 9) / 91))
        assert learning_rate_factor(schedule, int(middle), 100) == pytest.approx(expected)
        assert 0.1 < factors[-1] < 0.101

    def test_linear_is_constant_then_decays_linearly(self):
        schedule = ScheduleSection(
            name="linear", cooldown_fraction=0.4, min_learning_rate_ratio=0.0
        )
        factors = [learning_rate_factor(schedule, step, 100) for step in range(100)]
        assert factors[:61] == [1.0] * 61
        assert factors[80] == pytest.approx(0.5)
        assert factors[99] == pytest.approx(1 / 40)


def test_muon_update_has_the_size_of_its_learning_rate():
    """An orthogonalised update has singular values near 1, so its norm gives the learning rate."""
    config = config_of(optimizer_keys={"weight_decay": 0.0}.items())
    torch.manual_seed(0)
    model = build_model(config.model)
    muon, _ = build_optimizers(model, config)
    weight = model.blocks[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon.step()
    rms = (weight.detach() - before).norm().item() / math.sqrt(weight.shape[0])
    assert rms == pytest.approx(muon.param_groups[0]["lr"], rel=0.3)


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 48)])
def test_float32_muon_equals_torch_muon_up_to_rounding(shape):
    generator = torch.Generator().manual_seed(1)
    start, *gradients = (torch.randn(shape, generator=generator) for _ in range(4))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 0.1, "weight_decay": 0.05, "momentum": 0.9}
    for parameter, kind in ((ours, Float32Muon), (theirs, torch.optim.Muon)):
        optimizer = kind([parameter], **options)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).norm() / (start - theirs).norm() < 0.02


def test_orthogonalize_brings_singular_values_near_one():
    matrix = torch.randn(24, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = torch.linalg.svdvals(orthogonalize(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7))
    assert values.min() > 0.6
    assert values.max() < 1.3
