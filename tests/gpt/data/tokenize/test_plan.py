"""Planning a corpus from metadata alone: units and their keys. tests/benchmarks/bench_planner.py
does the same at full size."""

import planner_data
import pytest

from gpt.config.schema import fingerprint
from gpt.data.tokenize import tokenizer
from gpt.data.tokenize.plan import FORMAT_VERSION, non_default_settings, plan_units
from gpt.data.tokenize.units import split_into_units


@pytest.fixture(scope="module")
def found():
    return list(planner_data.sources(files=60, groups=100, text_bytes_of_group=6_300_000))


def keys_by_the_rule(plan, sources):
    """The key of each unit, by the rule of the first release."""
    data = plan.data
    settings = fingerprint(
        {
            "format": FORMAT_VERSION,
            "ranks": tokenizer.RANKS_SHA256,
            "text_column": data.text_column,
            "validation_fraction": data.validation_fraction,
            "selection": {k: v for k, v in non_default_settings(data).items() if k != "max_tokens"},
        }
    )
    keys, before = [], ""
    for source in sources:
        identity = plan.identities.by_file[source.file].sha256
        for unit in split_into_units([tuple(group) for group in source.groups.tolist()]):
            rows = [unit.rows.start, unit.rows.stop]
            values = {"settings": settings, "file": identity, "rows": rows, "before": before}
            keys.append(fingerprint(values | {"partitions": {}})[:32])
            before = keys[-1] if data.drop_duplicates else ""
    return keys


@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_unit_keys_match_earlier_datasets(tmp_path, found, drop_duplicates):
    plan = planner_data.plan(tmp_path, found, drop_duplicates=drop_duplicates, min_length=7)
    keys = keys_by_the_rule(plan, found)
    assert len(set(keys)) == len(keys) > 1_900
    assert [unit.key for unit in plan_units(plan, found)] == keys


def test_units_cover_every_row_once(tmp_path, found):
    rows = {source.file: 0 for source in found}
    for planned in plan_units(planner_data.plan(tmp_path, found), found):
        assert planned.unit.rows.start == rows[planned.source.file]
        rows[planned.source.file] = planned.unit.rows.stop
    assert list(rows.values()) == [source.rows for source in found]


def test_fingerprint_depends_on_the_files(tmp_path, found):
    plans = [planner_data.plan(tmp_path, some) for some in (found, found, found[1:])]
    assert plans[0].fingerprint == plans[1].fingerprint != plans[2].fingerprint
    assert list(plan_units(plans[0], [])) == []
