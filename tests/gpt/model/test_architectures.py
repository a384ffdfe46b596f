"""The networks against Hugging Face's implementations with the same weights, and in training."""

import pytest
import torch
from networks import build_hf_gpt2, is_conv1d, model_section, randomize_weights
from transformers import NanoChatConfig, NanoChatForCausalLM

from gpt.config.loading import build_config
from gpt.config.schema import ModelSection
from gpt.model import base
from gpt.model.architectures import build_model
from gpt.model.kv_cache import KVCache
from gpt.model.loss import compute_logits, linear_cross_entropy
from gpt.training.optimizer import build_optimizers


def build_hf_nanochat(ours):
    config = ours.config
    theirs = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            intermediate_size=4 * config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            max_position_embeddings=config.block_size,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
    )

    def renamed(name):
        return name if name.startswith("lm_head") else f"model.{name}"

    theirs.load_state_dict({renamed(n): t for n, t in ours.state_dict().items()})
    return theirs, renamed


@pytest.mark.parametrize(
    ("architecture", "twin", "changes"),
    [
        ("gpt2", build_hf_gpt2, {"bias": True}),
        ("nanochat", build_hf_nanochat, {}),
        ("nanochat", build_hf_nanochat, {"n_head": 1, "n_embd": 20}),
    ],
)
def test_logits_and_gradients_equal_hugging_face(architecture, twin, changes):
    ours = randomize_weights(build_model(model_section(architecture, **changes)))
    theirs, renamed = twin(ours)
    ids = torch.randint(50_257, (3, 24), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    hidden = ours(inputs)
    logits = theirs(inputs).logits
    mine, _ = compute_logits(hidden.flatten(0, 1), ours.head, ours.logit_softcap)
    torch.testing.assert_close(mine.view_as(logits), logits, rtol=0, atol=1e-4)

    linear_cross_entropy(hidden, ours.head, targets, ours.logit_softcap, chunk_rows=7).backward()
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    ).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        other = gradients[renamed(name)]
        other = other.T if architecture == "gpt2" and is_conv1d(name) else other
        error = (parameter.grad - other).norm() / other.norm().clamp(min=1e-9)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
def test_activation_checkpointing_gives_the_same_gradients(architecture):
    model = randomize_weights(build_model(model_section(architecture)))
    ids = torch.arange(20).view(1, 20)

    def gradients():
        model.zero_grad()
        linear_cross_entropy(model(ids), model.head, ids, model.logit_softcap).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.activation_checkpointing = True
    again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
def test_heads_padded_for_cuda_attend_as_unpadded_ones(architecture, monkeypatch):
    model = randomize_weights(build_model(model_section(architecture, n_embd=20)))
    ids = torch.arange(12).view(1, 12)

    def compute():
        model.zero_grad()
        hidden = model(ids)
        hidden.square().sum().backward()
        cache = KVCache(model.config)
        parts = [model(part, cache) for part in (ids[:, :11], ids[:, 11:])]
        return [
            hidden,
            torch.cat(parts, dim=1),
            *(p.grad for p in model.parameters() if p.grad is not None),
        ]

    assert base.head_padding(torch.zeros(1, 2, 12, 10)) == 0  # on a CPU
    expected = compute()
    monkeypatch.setattr(base, "head_padding", lambda q: 6)
    for padded, unpadded in zip(compute(), expected, strict=True):
        torch.testing.assert_close(padded, unpadded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
def test_attention_is_causal(architecture):
    model = randomize_weights(build_model(model_section(architecture)))
    ids = torch.arange(20).view(1, 20)
    changed = ids.clone()
    changed[0, 12:] += 100
    torch.testing.assert_close(model(ids)[:, :12], model(changed)[:, :12])


@pytest.mark.parametrize(("architecture", "optimizer"), [("gpt2", "adamw"), ("nanochat", "muon")])
def test_network_overfits_one_batch(architecture, optimizer):
    full = build_config(
        {
            "run": {"name": "t"},
            "model": model_section(architecture).model_dump(),
            "data": {"source": "unused.parquet"},
            "training": {"batch_size": 2, "grad_acc": 1, "max_steps": 60},
            "optimizer": {"name": optimizer, "learning_rate": 0.01, "weight_decay": 0.0}
            | ({"embedding_learning_rate": 0.1} if optimizer == "muon" else {})
            | ({"head_learning_rate": 0.02} if optimizer == "muon" else {}),
        }
    )
    # Sixty updates of 50,304 rows would take a minute; 512 rows show the same.
    config = full.model_copy(update={"model": full.model.model_copy(update={"vocab_size": 512})})
    torch.manual_seed(0)
    model = build_model(config.model)
    optimizers = build_optimizers(model, config)
    ids = torch.randint(512, (2, 17))
    for _ in range(60):
        loss = (
            linear_cross_entropy(model(ids[:, :-1]), model.head, ids[:, 1:], model.logit_softcap)
            / 32
        )
        loss.backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert loss.item() < 0.05


@pytest.mark.parametrize(
    ("n_embd", "millions"), [(480, 57.8), (512, 64.0), (576, 77.4), (720, 111.6), (768, 124.4)]
)
def test_parameter_counts_of_known_widths(n_embd, millions):
    heads = 8 if n_embd == 512 else 12
    with torch.device("meta"):
        model = build_model(ModelSection(n_layer=12, n_head=heads, n_embd=n_embd, block_size=1024))
    assert round(model.num_parameters() / 1e6, 1) == millions
