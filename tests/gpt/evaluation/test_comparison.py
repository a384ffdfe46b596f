"""Whether two models differ, who becomes champion, what the page of a comparison says."""

from __future__ import annotations

import numpy as np
import pytest
from comparison_data import config_result, report, run_result
from scipy import stats

from gpt.artifacts import HellaSwagResult
from gpt.evaluation.comparison import summarize_comparison
from gpt.evaluation.significance import compare_reports, compare_seeds, compare_with_champion
from tasks.pages.comparison import html_page, markdown_page, pictures

"""How hard each sequence is for any model."""


def test_pairs_tell_apart_what_unpaired_losses_do_not():
    one, other = report(0.01), report(0.0)
    found = compare_reports(one, other)
    assert found.is_significantly_better
    assert found.mean == pytest.approx(-0.01)
    a, b = np.array(one.sequence_losses), np.array(other.sequence_losses)
    half = stats.t.ppf(0.975, 399) * (a - b).std(ddof=1) / 20  # Student's t by hand
    assert (found.low, found.high) == pytest.approx((-0.01 - half, -0.01 + half))
    assert not compare_reports(other, one).is_significantly_better
    assert compare_reports(other, one).is_significant
    halved = report(0.01, count=200)  # a model whose sequences are twice as long
    assert not compare_reports(halved, other).is_significant


def test_a_model_is_not_different_from_itself():
    same = report()
    assert not compare_reports(same, same).is_significant
    assert not compare_seeds([3.0, 3.0], [3.0, 3.0]).is_significant


def test_seeds_need_more_than_one_a_side():
    assert compare_seeds([3.1], [3.2, 3.3]).low is None
    assert compare_seeds([3.10, 3.11, 3.12], [3.20, 3.21, 3.22]).is_significantly_better
    assert not compare_seeds([3.0, 3.3, 3.6], [3.1, 3.4, 3.5]).is_significant


@pytest.mark.parametrize(
    ("champion", "promoted", "reason"),
    [
        (None, True, "no champion"),
        (report(0.0), True, "better: loss"),
        (report(0.10), False, "worse: loss"),
        (report(0.05), False, "not different beyond chance"),
        (report(0.0, slice_fingerprint="b" * 16), False, "evaluated on other text"),
        (report(0.0, sequence_losses=()), False, "says nothing"),
    ],
)
def test_a_champion_is_beaten_by_more_than_chance(champion, promoted, reason):
    judgement = compare_with_champion(report(0.05), champion)
    assert judgement.promoted == promoted
    assert reason in judgement.reason


def test_the_verdict_names_the_best_and_by_how_much():
    said = summarize_comparison(
        [
            config_result("a", run_result(0.0)),
            config_result("b", run_result(0.2)),
            config_result("c", run_result(0.1)),
        ]
    )
    assert said.startswith("b is the best: ")
    assert "lower than that of c and a by more than chance; it leads c by 0.1000 nats" in said
    assert "--seeds 3" in said


def test_the_verdict_knows_when_two_are_not_different():
    small, large = run_result(0.1, parameters=10), run_result(0.1001, parameters=99)
    said = summarize_comparison(
        [
            config_result("small", small),
            config_result("large", large),
            config_result("bad", run_result(0.0)),
        ]
    )
    assert said.startswith("large has the lowest validation loss, ")
    assert "small (by 0.0001 nats" in said
    assert "is not different from it beyond chance; bad is worse." in said
    assert "Of these small is the smallest" in said


def test_over_seeds_the_spread_of_seeds_decides():
    steady = config_result("a", *(run_result(0.1 + s / 1000, seed=s) for s in range(3)))
    wild = config_result("b", *(run_result(0.3 * s, seed=s) for s in range(3)))
    said = summarize_comparison([steady, wild])
    assert "not different" in said
    assert "Chance is measured over seeds." in said


def test_a_config_that_lost_its_other_seeds_is_not_called_worse():
    several = config_result("a", *(run_result(0.2 + s / 1000, seed=s) for s in range(3)))
    single = config_result("b", run_result(0.0), failures=("out of memory", "out of memory"))
    said = summarize_comparison([several, single])
    assert "b (by 0.2010 nats, an interval unknown) is not different from it" in said
    assert "over seeds, of which b has one result alone." in said


def test_the_verdict_tells_of_failures_and_of_unequal_tokens():
    failed = config_result("broken", failures=("out of memory",))
    said = summarize_comparison(
        [
            failed,
            config_result("a", run_result(0.1)),
            config_result("b", run_result(0.0, tokens=99_000)),
        ]
    )
    assert "broken has no result: out of memory." in said
    assert "different numbers of tokens (a 50,000 and b 99,000)" in said
    assert summarize_comparison([failed, config_result("a", run_result())]).startswith(
        "Only a came to an end"
    )
    assert summarize_comparison([failed]).startswith("No config came to an end.")


def test_the_pages_hold_every_row_and_escape_what_a_model_wrote():
    swag = HellaSwagResult(
        examples=100,
        accuracy=0.25,
        accuracy_error=0.04,
        normalized_accuracy=0.2612,
        normalized_accuracy_error=0.0439,
        fingerprint="c" * 16,
    )
    scored = run_result(0.2, report=report(0.2, hellaswag=swag), energy_joules=7.2e6)
    entries = [
        config_result("a", run_result(0.0)),
        config_result("b", scored),
        config_result("c", failures=("<oom>",)),
    ]
    markdown = markdown_page("three", entries, summarize_comparison(entries))
    row = next(line for line in markdown.splitlines() if line.startswith("| b |"))
    for part in ("1,000", "50,000", "0.2612 ± 0.0439", "1,234", "0.20", "3.00", "2.000"):
        assert part in row
    assert markdown.index("| b |") < markdown.index("| a |")  # the best first
    drawn = pictures(entries)
    assert set(drawn) == {"loss-by-tokens", "loss-by-hours", "loss-by-parameters", "throughput"}
    html = html_page("three", entries, summarize_comparison(entries), drawn)
    assert " &lt;b&gt;end&lt;/b&gt;" in html
    assert "&lt;oom&gt;" in html
    assert "<b>end" not in html
    assert html.count("<svg") == 4
    for outside in ("src=", 'href="http', "@import", "<script"):
        assert outside not in html
    assert pictures(entries) == drawn  # the same bytes again
