"""A page is one file: it asks nobody for anything, cannot be broken by what it shows, and works by keyboard."""

import json
import re

import pytest

from helpers.browser import Browser, find_chromium
from helpers.synthetic_results import grid
from torchtune_kd.reports.comparison import compare
from torchtune_kd.reports.comparison_report import write_report
from torchtune_kd.reports.page import _STYLE, escape, page

HOSTILE = "</script><script>document.title='broken'</script><img src=https://example.org/x.png onerror=alert(1)>\"'&"
OUTSIDE = re.compile(r"""(?:src|href|action|data|poster)\s*=\s*["']?(?!#|data:)[^"'\s>]|url\((?!#)|@import|fetch\(""")


def test_text_from_elsewhere_stays_text():
    text = page(HOSTILE, f"<p title='{escape(HOSTILE)}'>{escape(HOSTILE)}</p>", data={"text": HOSTILE})
    assert text.count("<script") == 2 and "<img" not in text
    embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(embedded) == {"text": HOSTILE}


def test_data_without_a_number_are_refused_rather_than_written():
    with pytest.raises(ValueError):
        page("A page", "", data={"value": float("nan")})


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_read_in_both_schemes():
    """WCAG AA asks for 4.5 to 1."""
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", _STYLE, re.DOTALL)
    ]
    assert len(schemes) == 2
    for colours in schemes:
        for ink in ("ink", "soft", "accent", "good", "bad"):
            for paper in ("paper", "panel"):
                dark, light = sorted((luminance(colours[ink]), luminance(colours[paper])))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper, colours)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    lines = grid()
    write_report(compare(lines, "sft", title="Losses & temperatures <b>"), {}, folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(find_chromium(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.slow
def test_the_report_names_nothing_outside_of_itself(report):
    text = report.read_text(encoding="utf-8")
    assert OUTSIDE.findall(text) == []
    assert "<b>" not in text and text.count("<svg") == 12


@pytest.mark.slow
@pytest.mark.heavy
def test_no_request_leaves_the_page(browser, report):
    browser.open(report)
    assert {url for url in browser.requests if not url.startswith("data:")} == {report.as_uri()}
    assert browser.messages == []
    browser.evaluate("fetch('https://example.org/').catch(() => 0)")
    assert any("Content Security Policy" in message for message in browser.messages)


@pytest.mark.slow
@pytest.mark.heavy
def test_tables_sort_by_keyboard(browser, report):
    """Tab reaches the buttons in the heads; Enter sorts, Space turns the order round."""
    browser.open(report)
    browser.evaluate(
        """{window.table = document.querySelectorAll("table.sortable")[1];
        window.heads = [...table.tHead.rows[0].cells];
        window.column = heads.findIndex(head => head.textContent === "mean");
        heads[column - 1].firstElementChild.focus()}"""
    )
    shown = "[...table.tBodies[0].rows].map(row => [row.cells[0].textContent, Number(row.cells[column].dataset.value)])"
    before = browser.evaluate(shown)
    browser.press("Tab", "Enter")
    up = browser.evaluate(shown)
    assert up == sorted(before, key=lambda row: row[1]) != before
    assert browser.evaluate("heads[column].getAttribute('aria-sort')") == "ascending"
    browser.press("Space")
    assert browser.evaluate(shown) == up[::-1]
    assert browser.evaluate("heads.map(head => head.getAttribute('aria-sort')).join()").count("descending") == 1
    # what has no number is last in either order, and names sort as words
    browser.evaluate("{heads.at(-4).firstElementChild.click(); heads.at(-4).firstElementChild.click()}")
    assert browser.evaluate(shown)[-1][0] == "sft"
    browser.evaluate("heads[0].firstElementChild.click()")
    names = [name for name, _ in browser.evaluate(shown)]
    assert names == sorted(names)


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window_and_follows_the_scheme(browser, report, width, scheme):
    browser.open(report, width=width, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.querySelectorAll('.scroll')].every(box => box.clientWidth <= innerWidth)")
    red = browser.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(red) < 60) == (scheme == "dark")
    assert browser.evaluate("getComputedStyle(document.querySelector('svg text')).fill") == browser.evaluate(
        "getComputedStyle(document.body).color"
    )
