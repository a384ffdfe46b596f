"""Invalid configs and their messages, overrides, and the shipped configs."""

import json

import pytest

from gpt.config.loading import build_config, load_config, merge_overrides, parse_override
from gpt.config.rules import valid_head_splits
from gpt.config.schema import RunConfig
from gpt.errors import ConfigError


def make_raw(**changes):
    values = {
        "run": {"name": "t"},
        "model": {"n_layer": 12, "n_head": 12, "n_embd": 576, "block_size": 1024},
        "data": {"source": "a.parquet"},
        "training": {"batch_size": 16, "grad_acc": 32, "max_steps": 100},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return values


def find_problems(values):
    with pytest.raises(ConfigError) as caught:
        build_config(values)
    return {problem.key: problem for problem in caught.value.problems}


def test_indivisible_width_is_refused_with_quotient_and_choices():
    problem = find_problems(make_raw(model__n_embd=512))["model.n_embd"]
    assert "512 / 12 = 42.67" in problem.rule
    for choice in ("480/12", "576/12", "512/8", "512/16"):
        assert choice in problem.remedy


@pytest.mark.parametrize(("n_embd", "n_head"), [(512, 12), (100, 7), (13, 5), (5, 12), (1, 2)])
def test_every_suggested_head_split_is_valid(n_embd, n_head):
    choices = valid_head_splits(n_embd, n_head)
    assert choices
    for width, heads in choices:
        assert width % heads == 0
        assert (width == n_embd) != (heads == n_head)
        build_config(make_raw(model__n_embd=width, model__n_head=heads))


def test_all_problems_are_reported_at_once():
    found = find_problems(
        make_raw(model__n_embd=512, model__dropout=1.5, training__batch_size=0, optimizer__lr=1.0)
    )
    assert set(found) == {"model.n_embd", "model.dropout", "training.batch_size", "optimizer.lr"}


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        ({"model__n_layr": 3}, "model.n_layr", "did you mean n_layer?"),
        ({"model__batch_size": 3}, "model.batch_size", "training.batch_size"),
        ({"training__max_steps": "9"}, "training.max_steps", "integer"),
        ({"training__max_steps": True}, "training.max_steps", "integer"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate", "finite"),
        ({"run__name": "../x"}, "run.name", "pattern"),
        ({"data__source": []}, "data.source", "at least 1"),
        ({"schedule__warmup_steps": 100}, "schedule.warmup_steps", "training.max_steps = 100"),
        ({"model__vocab_size": 70_000}, "model.vocab_size", "65536"),
        ({"hardware__device": "tpu"}, "hardware.device", "pattern"),
    ],
)
def test_wrong_value_is_reported_with_rule_and_remedy(change, key, message):
    found = find_problems(make_raw(**change))
    assert set(found) == {key}
    assert message in str(found[key])
    assert found[key].remedy


def test_missing_keys_are_reported():
    values = make_raw()
    del values["model"]["n_embd"], values["data"]
    assert set(find_problems(values)) == {"model.n_embd", "data"}


@pytest.mark.parametrize("section", [3, "x", [], None])
def test_section_that_is_not_a_table_is_refused(section):
    assert "model" in find_problems(make_raw() | {"model": section})


def test_overrides_are_merged_before_validation(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        '[run]\nname = "t"\n[model]\nn_layer = 2\nn_head = 12\nn_embd = 512\nblock_size = 8\n'
        '[data]\nsource = "a"\n[training]\nbatch_size = 1\ngrad_acc = 1\nmax_steps = 5\n'
    )
    config = load_config(path, ["model.n_head=8", 'data.source=["b", "c"]', "run.name=other"])
    assert (config.model.n_head, config.data.source) == (8, ("b", "c"))
    assert (config.run.name, config.model.n_embd) == ("other", 512)
    assert load_config(path, {"model": {"n_embd": 480}}).model.n_layer == 2


@pytest.mark.parametrize("text", ["n_embd=3", "model.n_embd", "=3", ".x=3", "model.=3"])
def test_malformed_override_is_refused(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_override(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("3e-4", 3e-4), ('"x"', "x"), ("bare/word", "bare/word"), ("[1, 2]", [1, 2])],
)
def test_override_values_are_toml_or_bare_words(text, value):
    assert parse_override(f"a.b.c={text}") == {"a": {"b": {"c": value}}}


def test_merging_does_not_change_its_inputs():
    base = {"a": {"b": 1, "c": 2}}
    assert merge_overrides(base, {"a": {"b": 9}, "d": 0}) == {"a": {"b": 9, "c": 2}, "d": 0}
    assert base == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"[run\n", "not TOML"), (b"\xff\xfe", "UTF-8"), (b"a = 1e", "TOML")],
)
def test_unreadable_file_is_refused(tmp_path, content, message):
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_config_survives_a_round_trip_through_json():
    config = build_config(make_raw())
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert build_config(json.loads(config.model_dump_json())) == config


def test_tokens_per_step():
    assert build_config(make_raw()).tokens_per_step == 16 * 32 * 1024


@pytest.mark.parametrize("name", ["gpt-480", "gpt-576", "gpt-720", "gpt-768", "tiny"])
def test_shipped_configs_are_valid(request, name):
    config = load_config(request.config.rootpath / "configs" / f"{name}.toml")
    assert config.run.name == name
    if name != "tiny":
        model, training = config.model, config.training
        assert (model.n_layer, model.n_head, model.block_size) == (12, 12, 1024)
        assert model.n_embd == int(name.removeprefix("gpt-"))
        assert (training.batch_size, training.grad_acc, training.dtype) == (16, 32, "bfloat16")
