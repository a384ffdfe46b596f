"""The HTML page of a comparison in a real browser, opened as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from browser import requested_hosts
from comparison_data import config_result, run_result

from gpt.evaluation.comparison import summarize_comparison
from tasks.pages.comparison import HEADINGS, draw_charts, render_html, render_markdown

NAMES = ("gpt-480", "gpt-576", "gpt-720")


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def test_page_shows_table_charts_and_samples_offline(browser: Any, tmp_path: Path) -> None:
    better = (0.0, 0.1, 0.2)
    results = [config_result(name, run_result(by)) for name, by in zip(NAMES, better, strict=True)]
    page = tmp_path / "comparison.html"
    markdown = render_markdown("widths", results, summarize_comparison(results))
    page.write_text(render_html("widths", results, markdown, draw_charts(results)))
    requested_hosts(browser)
    browser.get(page.as_uri())

    assert texts(browser, "#results th") == list(HEADINGS)
    rows = [row.split() for row in texts(browser, "#results tbody tr")]
    assert [row[0] for row in rows] == ["gpt-720", "gpt-576", "gpt-480"]  # best first
    assert rows[0][1:3] == ["1,000", "50,000"]
    charts = browser.find_elements("css selector", ".charts svg")
    assert len(charts) == 4
    for chart in charts:
        assert chart.size["width"] > 300
        drawn = [text.text for text in chart.find_elements("css selector", "text")]
        assert set(NAMES) <= set(drawn)  # in the legend or beside the bars
    assert texts(browser, "h1 + p")[0].startswith("gpt-720 has the lowest validation loss")
    assert texts(browser, ".samples tbody td") == ["The", *[" <b>end</b>"] * 3]
    # Nothing overflows the page on the right.
    width, window = (
        browser.execute_script(f"return document.documentElement.{name}")
        for name in ("scrollWidth", "clientWidth")
    )
    assert width <= window
    picture = tmp_path / "comparison.png"
    assert browser.save_screenshot(str(picture))
    assert picture.stat().st_size > 50_000
    assert not requested_hosts(browser)
