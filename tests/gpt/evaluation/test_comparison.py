"""Significance of loss differences, promotion, the summary and the pages of a comparison."""

from __future__ import annotations

import numpy as np
import pytest
from comparison_data import config_result, report, run_result
from scipy import stats

from gpt.artifacts import HellaSwagResult
from gpt.evaluation.comparison import summarize_comparison
from gpt.evaluation.significance import compare_reports, compare_seeds, compare_with_champion
from tasks.pages.comparison import draw_charts, render_html, render_markdown


def test_paired_comparison_is_more_sensitive_than_unpaired():
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


def test_model_does_not_differ_from_itself():
    same = report()
    assert not compare_reports(same, same).is_significant
    assert not compare_seeds([3.0, 3.0], [3.0, 3.0]).is_significant


def test_comparison_over_seeds_needs_several_per_config():
    assert compare_seeds([3.1], [3.2, 3.3]).low is None
    assert compare_seeds([3.10, 3.11, 3.12], [3.20, 3.21, 3.22]).is_significantly_better
    assert not compare_seeds([3.0, 3.3, 3.6], [3.1, 3.4, 3.5]).is_significant


@pytest.mark.parametrize(
    ("champion", "promoted", "reason"),
    [
        (None, True, "no champion"),
        (report(0.0), True, "better: loss"),
        (report(0.10), False, "worse: loss"),
        (report(0.05), False, "no significant difference: loss"),
        (report(0.0, slice_fingerprint="b" * 16), False, "evaluated on other text"),
        (report(0.0, sequence_losses=()), False, "only one sequence"),
    ],
)
def test_challenger_is_promoted_if_significantly_better(champion, promoted, reason):
    decision = compare_with_champion(report(0.05), champion)
    assert decision.promoted == promoted
    assert reason in decision.reason


def test_summary_names_the_best_config_and_its_lead():
    summary = summarize_comparison(
        [
            config_result("a", run_result(0.0)),
            config_result("b", run_result(0.2)),
            config_result("c", run_result(0.1)),
        ]
    )
    assert summary.startswith("b has the lowest validation loss, ")
    assert "significantly lower than c and a; its lead over c is 0.1000 nats per token" in summary
    assert "--seeds 3" in summary


def test_summary_says_if_the_lead_is_not_significant():
    small, large = run_result(0.1, parameters=10), run_result(0.1001, parameters=99)
    summary = summarize_comparison(
        [
            config_result("small", small),
            config_result("large", large),
            config_result("bad", run_result(0.0)),
        ]
    )
    assert summary.startswith("large has the lowest validation loss, ")
    assert "but not significantly lower than small (0.0001 nats per token, 95% interval" in summary
    assert "; bad is significantly worse." in summary
    assert "Of large and small, small is the smallest" in summary


def test_significance_with_several_seeds_is_over_seeds():
    steady = config_result("a", *(run_result(0.1 + s / 1000) for s in range(3)))
    wild = config_result("b", *(run_result(0.3 * s) for s in range(3)))
    summary = summarize_comparison([steady, wild])
    assert "not significantly lower" in summary
    assert "Significance is computed over seeds." in summary


def test_config_with_one_finished_seed_is_not_called_worse():
    several = config_result("a", *(run_result(0.2 + s / 1000) for s in range(3)))
    single = config_result("b", run_result(0.0), failures=("out of memory", "out of memory"))
    summary = summarize_comparison([several, single])
    assert "not significantly lower than b (0.2010 nats per token, interval unknown)" in summary
    assert "over seeds (b: only one result)." in summary


def test_summary_reports_failures_and_unequal_tokens():
    failed = config_result("broken", failures=("out of memory",))
    summary = summarize_comparison(
        [
            failed,
            config_result("a", run_result(0.1)),
            config_result("b", run_result(0.0, tokens=99_000)),
        ]
    )
    assert "broken has no result: out of memory." in summary
    assert "different numbers of tokens (a 50,000 and b 99,000)" in summary
    assert summarize_comparison([failed, config_result("a", run_result())]).startswith(
        "Only a finished"
    )
    assert summarize_comparison([failed]).startswith("No config finished.")


def test_pages_show_every_config_and_escape_model_output():
    swag = HellaSwagResult(
        examples=100,
        accuracy=0.25,
        accuracy_error=0.04,
        normalized_accuracy=0.2612,
        normalized_accuracy_error=0.0439,
        fingerprint="c" * 16,
    )
    scored = run_result(0.2, report=report(0.2, hellaswag=swag), energy_joules=7.2e6)
    results = [
        config_result("a", run_result(0.0)),
        config_result("b", scored),
        config_result("c", failures=("<oom>",)),
    ]
    markdown = render_markdown("three", results, summarize_comparison(results))
    row = next(line for line in markdown.splitlines() if line.startswith("| b |"))
    for part in ("1,000", "50,000", "0.2612 ± 0.0439", "1,234", "0.20", "3.00", "2.000"):
        assert part in row
    assert markdown.index("| b |") < markdown.index("| a |")  # best first
    charts = draw_charts(results)
    assert set(charts) == {"loss-by-tokens", "loss-by-hours", "loss-by-parameters", "throughput"}
    html = render_html("three", results, markdown, charts)
    assert " &lt;b&gt;end&lt;/b&gt;" in html
    assert "&lt;oom&gt;" in html
    assert "<b>end" not in html
    assert html.count("<svg") == 4
    for outside in ("src=", 'href="http', "@import", "<script"):
        assert outside not in html
    assert draw_charts(results) == charts
