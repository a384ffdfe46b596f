"""The page of a comparison in a real browser, from the file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from browser import requested_hosts
from comparison_data import config_result, run_result

from gpt.evaluation.comparison import summarize_comparison
from tasks.pages.comparison import COLUMNS, html_page, pictures

NAMES = ("gpt-480", "gpt-576", "gpt-720")


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def test_a_person_sees_table_curves_samples_and_verdict(browser: Any, tmp_path: Path) -> None:
    better = (0.0, 0.1, 0.2)
    entries = [config_result(name, run_result(by)) for name, by in zip(NAMES, better, strict=True)]
    page = tmp_path / "comparison.html"
    page.write_text(html_page("widths", entries, summarize_comparison(entries), pictures(entries)))
    requested_hosts(browser)
    browser.get(page.as_uri())

    assert texts(browser, "#results th") == [column.heading for column in COLUMNS]
    rows = [row.split() for row in texts(browser, "#results tbody tr")]
    assert [row[0] for row in rows] == ["gpt-720", "gpt-576", "gpt-480"]  # the best first
    assert rows[0][1:3] == ["1,000", "50,000"]
    drawings = browser.find_elements("css selector", ".pictures svg")
    assert len(drawings) == 4
    for drawing in drawings:
        assert drawing.size["width"] > 300
        drawn = [text.text for text in drawing.find_elements("css selector", "text")]
        assert set(NAMES) <= set(drawn)  # the legend, or the bars' names
    assert texts(browser, ".verdict")[0].startswith("gpt-720 is the best")
    assert texts(browser, ".samples tbody td") == ["The", *[" <b>end</b>"] * 3]
    # Nothing stands out of the page's right side.
    width, window = (
        browser.execute_script(f"return document.documentElement.{name}")
        for name in ("scrollWidth", "clientWidth")
    )
    assert width <= window
    picture = tmp_path / "comparison.png"
    assert browser.save_screenshot(str(picture))
    assert picture.stat().st_size > 50_000
    assert not requested_hosts(browser)
