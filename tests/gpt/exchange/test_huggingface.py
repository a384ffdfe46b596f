"""Exports loaded by transformers, and transformers' GPT-2 imported."""

from __future__ import annotations

import json
import shutil
from pydoc_data.topics import topics

import pytest
import torch
from networks import model_section, randomize_weights
from safetensors.torch import load_file
from training_data import make_token_dataset, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt.artifacts import EvaluationReport, LambadaResult, Sample
from gpt.data.tokenize.tokenizer import END_OF_TEXT, VOCAB_SIZE, encode, load_tokenizer
from gpt.errors import CheckpointError, ExchangeError
from gpt.exchange import huggingface
from gpt.exchange.huggingface import export_huggingface, import_huggingface
from gpt.exchange.model_card import ModelCardData
from gpt.model.architectures import ARCHITECTURES, build_model
from gpt.model.generate import SamplingParams, generate
from gpt.model.io import load_model, save_model
from gpt.model.loss import compute_logits

CPU = torch.device("cpu")
BLOCK = 24


@pytest.fixture
def place(tmp_path):
    """A folder that is deleted after the test, because its models are large."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def export_model(model, place):
    """Save and export a model; return the exported directory."""
    (place / "ours").mkdir()
    save_model(place / "ours", model.config, model.state_dict())
    export_huggingface(place / "ours", place / "theirs", ModelCardData())
    return place / "theirs"


def build_random_model(config):
    """Build a model from a random stream that repeats after about a million numbers, which is much
    faster than drawing each. Their number is prime, so no two rows are equal."""
    with torch.device("meta"):
        model = ARCHITECTURES[config.architecture](config)
    model.to_empty(device="cpu")
    numbers = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        for parameter in model.parameters():
            count = parameter.numel()
            repeated = numbers.repeat(-(-count // len(numbers)))[:count]
            parameter.copy_(repeated.view(parameter.shape))
            numbers = numbers.roll(-count)
    return model


def all_logits(model, ids):
    with torch.no_grad():
        hidden = model.eval()(ids)
        logits, _ = compute_logits(hidden.flatten(0, 1), model.head, model.logit_softcap)
    return logits.view(*ids.shape, -1)


def generate_with_transformers(theirs, directory, prompt, count):
    """Greedy text of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(f"<|endoftext|>{prompt}", return_tensors="pt")
    ids = theirs.generate(**inputs, max_new_tokens=count, do_sample=False)[0]
    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("n_embd", [480, 576, 720, 768])
@pytest.mark.parametrize("architecture", ["gpt2", "nanochat"])
def test_logits_and_greedy_text_match_transformers(architecture, n_embd, place):
    sizes = {"n_layer": 2, "n_head": 12, "n_embd": n_embd, "block_size": BLOCK}
    model = build_random_model(model_section(architecture, **sizes))
    directory = export_model(model, place)
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    expected = {"gpt2": "GPT2LMHeadModel", "nanochat": "NanoChatForCausalLM"}
    assert type(theirs).__name__ == expected[architecture]
    ids = torch.randint(VOCAB_SIZE, (2, BLOCK), generator=torch.Generator().manual_seed(1))
    ours = all_logits(model, ids)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=0, atol=1e-4)
    assert ours.std() > 0.1
    text = generate(model, "The quick brown fox", SamplingParams(max_tokens=8, temperature=0))
    assert text == generate_with_transformers(theirs, directory, "The quick brown fox", 8)
    assert len(text) > 8


@pytest.mark.parametrize(("architecture", "bias"), [("gpt2", True), ("nanochat", False)])
def test_padding_of_the_vocabulary_is_never_generated(architecture, bias, place):
    """Even if a padding row has the highest logit."""
    model = randomize_weights(build_model(model_section(architecture, block_size=BLOCK, bias=bias)))
    prompt = torch.tensor([[END_OF_TEXT, *encode("The").tolist()]])
    with torch.no_grad():
        model.head[50_300] = model.eval()(prompt)[0, -1] * 10
    assert int(all_logits(model, prompt)[0, -1].argmax()) == 50_300
    directory = export_model(model, place)
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(prompt).logits, all_logits(model, prompt), rtol=1e-4, atol=1e-4
        )
    text = generate(model, "The", SamplingParams(max_tokens=8, temperature=0))
    assert generate_with_transformers(theirs, directory, "The", 8) == text


@pytest.mark.parametrize("alone", [{"tokenizer.json"}, {"vocab.json", "merges.txt"}])
def test_the_tokenizer_gives_the_ids_of_tiktoken(alone, place):
    """From each of its two forms."""
    directory = export_model(build_model(model_section("gpt2", n_embd=2, n_layer=1)), place)
    for name in {"tokenizer.json", "vocab.json", "merges.txt"} - alone:
        (directory / name).unlink()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    awkward = [
        "",
        " ",
        "  x",
        "x\n\n\n  y ",
        "it's we'LL 'twas",
        "naïve 日本語 🙂",
        "a\u00a0b\u3000c",
        "\r\n\t",
    ]
    for text in [*awkward, *topics.values()]:
        assert tokenizer(text)["input_ids"] == encode(text).tolist(), text[:50]
    ids = load_tokenizer().encode_ordinary(awkward[4])
    assert tokenizer.decode(ids) == awkward[4]
    assert tokenizer("<|endoftext|>")["input_ids"] == [END_OF_TEXT]
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (END_OF_TEXT, BLOCK)


class TestImport:
    @pytest.fixture
    def theirs(self, place):
        """A GPT-2 saved by transformers with random weights and biases."""
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=BLOCK))
        randomize_weights(model).save_pretrained(place / "published")
        return model.eval()

    def changed(self, place, **values):
        path = place / "published" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def error(self, place):
        with pytest.raises(ExchangeError) as caught:
            import_huggingface(place / "published", place / "ours")
        assert not (place / "ours").exists()
        return str(caught.value)

    def test_import_and_export_change_nothing(self, theirs, place):
        imported = import_huggingface(place / "published", place / "ours")
        assert (imported.n_embd, imported.vocab_size, imported.bias) == (32, VOCAB_SIZE, True)
        model = load_model(place / "ours", CPU)
        ids = torch.randint(VOCAB_SIZE, (2, BLOCK), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(
                theirs(ids).logits, all_logits(model, ids), rtol=0, atol=1e-4
            )
        export_huggingface(place / "ours", place / "again", ModelCardData())
        before = load_file(place / "published" / "model.safetensors")
        after = load_file(place / "again" / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        again = AutoModelForCausalLM.from_pretrained(place / "again").config.to_dict()
        published = GPT2Config.from_pretrained(place / "published").to_dict()
        for key in ("_name_or_path", "transformers_version"):
            again.pop(key, None), published.pop(key, None)
        assert again == published

    def test_sharded_weights_and_old_names_give_the_same_model(self, theirs, place):
        import_huggingface(place / "published", place / "ours")
        theirs.save_pretrained(place / "parts", max_shard_size="3MB")
        assert len(list((place / "parts").glob("model-*.safetensors"))) > 1
        import_huggingface(place / "parts", place / "from_parts")
        # As the original file on the Hub: no prefix, and the causal mask among the weights.
        weights = load_file(place / "published" / "model.safetensors")
        old = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        old |= {"h.0.attn.bias": torch.ones(1, 1, BLOCK, BLOCK)}
        huggingface.save_file(old, place / "published" / "model.safetensors")
        import_huggingface(place / "published", place / "from_old")
        ours = load_file(place / "ours" / "model.safetensors")
        for folder in ("from_parts", "from_old"):
            others = load_file(place / folder / "model.safetensors")
            assert ours.keys() == others.keys()
            assert all(torch.equal(ours[name], others[name]) for name in ours)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("model_type", "llama"),
            ("activation_function", "relu"),
            ("n_inner", 100),
            ("scale_attn_by_inverse_layer_idx", True),
            ("scale_attn_weights", False),
            ("layer_norm_epsilon", 1e-6),
            ("tie_word_embeddings", False),
            ("add_cross_attention", True),
            ("vocab_size", 70_000),
            ("vocab_size", 1_000),
            ("n_head", 5),
            ("attn_pdrop", 0.3),
        ],
    )
    def test_unsupported_settings_are_refused(self, theirs, place, key, value):
        self.changed(place, **{key: value})
        message = self.error(place)
        shown = value if isinstance(value, str) and key == "model_type" else json.dumps(value)
        named = "n_embd = 32" if key == "n_head" else f"{key} = {shown}"
        assert f"config.json: {named}" in message
        assert "1 problem" in message
        assert "-> " in message

    def test_all_problems_are_reported_at_once(self, theirs, place):
        self.changed(place, activation_function="relu", n_inner=100, vocab_size=70_000)
        assert "3 problems" in self.error(place)

    def test_another_tokenizer_is_refused(self, theirs, place):
        (place / "published" / "vocab.json").write_text('{"a": 0}')
        assert "vocab.json" in self.error(place)

    def test_missing_or_wrong_weights_are_refused(self, theirs, place):
        path = place / "published" / "model.safetensors"
        weights = load_file(path)
        del weights["transformer.ln_f.bias"]
        huggingface.save_file(weights, path)
        assert "ln_f.bias: missing, expected 32" in self.error(place)
        path.write_bytes(path.read_bytes()[:1000])
        assert "cannot be read" in self.error(place)
        path.rename(path.with_name("pytorch_model.bin"))
        assert "pickled weights" in self.error(place)

    def test_a_directory_without_a_model_is_refused(self, place):
        assert "cannot be read: No such file" in self.error(place)


class TestFolders:
    @pytest.fixture
    def ours(self, tmp_path):
        model = build_model(model_section("gpt2", n_embd=2, n_layer=1))
        (tmp_path / "ours").mkdir()
        save_model(tmp_path / "ours", model.config, model.state_dict())
        return tmp_path / "ours"

    def test_an_existing_directory_is_not_overwritten(self, ours, tmp_path):
        (tmp_path / "out").mkdir()
        export_huggingface(ours, tmp_path / "out", ModelCardData())  # empty: nothing is lost
        with pytest.raises(ExchangeError, match="already exists"):
            export_huggingface(ours, tmp_path / "out", ModelCardData())

    def test_a_failure_leaves_nothing_behind(self, ours, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(huggingface, "write_tokenizer", full)
        with pytest.raises(ExchangeError, match="No space left on device"):
            export_huggingface(ours, tmp_path / "out", ModelCardData())
        assert [path.name for path in tmp_path.iterdir()] == ["ours"]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("config.json", None, "cannot be read: No such file"),
            ("config.json", b"{}", "no section model"),
            ("config.json", b'{"model": {"n_layer": 0}}', "invalid values in \\[model\\]"),
            ("model.safetensors", None, "cannot be read: No such file"),
            ("model.safetensors", b"12345678", "cannot be read"),
        ],
    )
    def test_invalid_model_folders_are_refused(self, ours, tmp_path, name, content, words):
        (ours / name).unlink()
        if content is not None:
            (ours / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}\n.*{words}"):
            export_huggingface(ours, tmp_path / "out", ModelCardData())

    def test_weights_of_another_config_are_refused(self, ours):
        values = json.loads((ours / "config.json").read_text())
        values["model"]["n_layer"] = 2
        (ours / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=r"h.1.ln_1.weight: missing, expected 2"):
            load_model(ours, CPU)


class TestModelCard:
    def card(self, ours, place, facts):
        export_huggingface(ours, place / "out", facts)
        return (place / "out" / "README.md").read_text()

    @pytest.fixture
    def ours(self, place):
        config = tiny_config("unused").model
        (place / "ours").mkdir()
        save_model(place / "ours", config, build_model(config).state_dict())
        return place / "ours"

    def test_the_card_lists_what_is_known(self, ours, place):
        report = EvaluationReport(
            step=20,
            tokens=640,
            loss=3.28,
            perplexity=26.6,
            bits_per_byte=1.1,
            standard_error=0.012,
            samples=(Sample(prompt="The", text=" end\nof it"),),
            lambada=LambadaResult(
                examples=5153, accuracy=0.3, accuracy_error=0.01, perplexity=40, fingerprint="f"
            ),
        )
        facts = ModelCardData(
            name="night",
            config=tiny_config("unused"),
            dataset=make_token_dataset(place / "data"),
            tokens_seen=5_120,
            step=20,
            report=report,
        )
        card = self.card(ours, place, facts)
        for part in (
            "\nlicense:\n",
            "# night",
            f"| parameters | {load_model(ours, CPU).num_parameters():,} |",
            "| tokens seen | 5,120 |",
            "| `optimizer.learning_rate` | 0.01 |",
            "- `up.parquet`: 1 rows",
            "| validation loss, nats per token | 3.2800 ± 0.0120 |",
            "| LAMBADA (OpenAI), accuracy | 0.3000 ± 0.0100 |",
            "> **The** end\n> of it",
            "| training tokens | 20,000 |",
        ):
            assert part in card
        assert "HellaSwag" not in card
        assert "made/up" not in card  # local paths are private

    def test_unknown_sections_are_left_out(self, ours, place):
        card = self.card(ours, place, ModelCardData())
        assert "## Training" not in card
        assert "## Data" not in card
        assert "## Evaluation" not in card
        assert "None" not in card
