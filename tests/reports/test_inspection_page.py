"""The page of an inspection: it shows any text as it is, and all of it can be reached by pointer and by keyboard."""

import json
import math
import re
import time

import pytest

from helpers.browser import Browser, find_chromium
from torchtune_kd.reports.inspected import Guess, Inspection, Model, Prediction, Token
from torchtune_kd.reports.inspection_page import BINS, inspection_page, level, shown
from torchtune_kd.reports.inspection_style import DARK, EDGES, LIGHT

ARROWS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35}
WORDS = [
    "The", " quick", " </script>", " <b>fox</b>", "\n", "\t", " ✓", "", " \"'&", "<|end|>", "\r\n", "\u200b", " dog",
]  # fmt: skip


def guess(place, shift):
    """Five ids, of which the second is the text's token, or, with a shift, none is."""
    first = place + shift if shift else place - 1
    likeliest = [(index, 0.5 / 2**rank) for rank, index in enumerate(range(first, first + 5))]
    return Guess(-math.log(0.25 if shift == 0 else 1e-3), likeliest)


def kl(place):
    """Every colour; the largest at place 7, then at 15, 23 and so on."""
    return (0.0005, 0.15, 0.3, 0.07, 0.7, 1.5, 3.0, 9.0)[place % 8] * (1 - place * 1e-5)


def made(count, windows=()):
    """An inspection of ``count`` tokens, whose ids are their places."""
    tokens = [Token(0, "The", 0, None)]
    for place in range(1, count):
        text = WORDS[place % len(WORDS)]
        prediction = Prediction(kl(place), guess(place, place % 5), guess(place, 0))
        tokens.append(Token(place, text, place, prediction))
    pieces = {place: WORDS[place % len(WORDS)] or "\ufffd" for place in range(count + 10)}
    models = Model("student", "/runs/epoch_0"), Model("teacher", "/models/t")
    return Inspection("a <text>", *models, tokens, pieces, windows, 32)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(find_chromium(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "inspect.html"
    path.write_text(inspection_page(made(200, windows=(64, 96))), encoding="utf-8")
    return path


def walk(browser, *keys):
    for key in keys:
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=ARROWS[key])
        browser.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=ARROWS[key])


def point_at(browser, place):
    x, y = browser.evaluate(
        f"""(() => {{ const token = document.getElementById("t{place}"); token.scrollIntoView({{block: "center"}});
        const box = token.getClientRects()[0]; return [box.left + box.width / 2, box.top + box.height / 2]; }})()"""
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def panel(browser):
    """Heading, first line, and for both models the rows of piece, share and whether it is the text's token."""
    return browser.evaluate(
        """[document.querySelector("#panel h3").textContent, document.querySelector("#panel p").textContent,
        ...[...document.querySelectorAll("#panel ol")].map(list => [...list.children].map(row =>
            [row.children[1].textContent, row.children[2].textContent, row.classList.contains("actual")]))]"""
    )


def focused(browser):
    return browser.evaluate("document.activeElement.id")


def test_text_is_shown_as_it_is_and_breaks_nothing():
    html = inspection_page(made(60))
    assert html.count("<script") == 2 and html.count("</script>") == 2 and "<b>fox" not in html
    spans = re.findall(r'<span id="t(\d+)" class="k\d" role="option"[^>]*>(.*?)</span>', html, re.DOTALL)
    assert [int(place) for place, _ in spans] == list(range(60))
    texts = [text for _, text in spans]
    assert texts[2:6] == [" &lt;/script&gt;", " &lt;b&gt;fox&lt;/b&gt;", "<i>↵</i>\n", "<i>⇥</i>\t"]
    assert texts[7] == "<i>◦</i>" and texts[10] == "<i>\\r</i><i>↵</i>\n" and texts[11] == "<i>⟨200B⟩</i>"
    assert "\r" not in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert data["labels"][2:8] == ["␣</script>", "␣<b>fox</b>", "↵", "⇥", "␣✓", "◦ a further token of ␣✓"]
    assert data["pieces"]["20"] == "� id 20"


def test_figures_are_those_of_the_inspection():
    found = made(60)
    values = [token.prediction.kl for token in found.tokens[1:]]
    assert found.kl == pytest.approx(sum(values) / 59)
    assert found.agreement == pytest.approx(sum(place % 5 == 0 for place in range(1, 60)) / 59)
    assert found.reference_perplexity == pytest.approx(4)
    html = inspection_page(found)
    assert f"<dd>{found.kl:.3g}</dd>" in html and "<dd>4.00</dd>" in html and "a &lt;text&gt;" in html
    worst = re.findall(r'<li><b class="k6">([\d.]+)</b> <a href="#t(\d+)">', html)
    assert [int(place) for _, place in worst] == [7, 15, 23, 31, 39, 47, 55]
    bars = [int(n) for n in re.findall(r"<title>[^:]*: (\d+) tokens", html)]
    assert len(bars) == len(BINS) + 1 and sum(bars) == 59
    assert bars == [sum(low <= v < high for v in values) for low, high in zip((0, *BINS), (*BINS, 99), strict=True)]


def test_a_student_that_equals_its_teacher_has_a_page():
    same = Guess(0.5, [(0, 0.6), (1, 0.2)])
    tokens = [Token(0, "a", 0, None), Token(1, "b", 1, Prediction(0.0, same, same))]
    found = Inspection("text", Model("s", "s"), Model("t", "t"), tokens, {0: "a", 1: "b"}, (), 1)
    assert "<dd>100 %</dd>" in inspection_page(found)


def test_colours_change_at_the_edges_which_are_edges_of_the_histogram():
    assert [level(kl) for kl in (None, 0, 0.0999, *EDGES)] == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert set(EDGES) <= set(BINS) and len(EDGES) == len(LIGHT) == len(DARK)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colours, sign", [(LIGHT, -1), (DARK, 1)], ids=["light", "dark"])
def test_lightness_alone_tells_colours_apart_and_ink_can_be_read(colours, sign):
    """WCAG AA asks for 4.5 to 1."""
    papers = [luminance(paper) for paper, _ in colours]
    assert papers == sorted(papers, key=lambda value: sign * value)
    for paper, ink in colours:
        dark, light = sorted((luminance(paper), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (paper, ink)


def test_whitespace_and_control_characters_have_signs():
    assert shown(" a\n\t\r\x00\x7f\u200b\ufe0f") == "␣a↵⇥\\r⟨0000⟩⟨007F⟩⟨200B⟩⟨FE0F⟩"


@pytest.mark.slow
@pytest.mark.heavy
def test_pointer_shows_what_both_models_expect(browser, file):
    browser.open(file)
    point_at(browser, 33)
    heading, facts, teacher, student = panel(browser)
    assert heading == "◦ a further token of ␣✓"
    assert facts == "KL 0.15 nats, token 34 of 200, from 33 tokens before it"
    assert [row[1] for row in teacher] == ["50 %", "25 %", "12.5 %", "6.3 %", "3.1 %"]
    assert [row[2] for row in teacher] == [False, True, False, False, False]
    # the student does not list the token of the text: it stands below the five
    assert [row[2] for row in student] == [False] * 5 + [True] and student[-1][1] == "0.1 %"
    assert [row[0] for row in student[:5]] == ["\\r↵", "⟨200B⟩", "␣dog", "The", "␣quick"]
    assert browser.evaluate("document.querySelectorAll('#panel b, #panel script').length") == 0
    # away from the text the panel returns to the token that has the focus, which is the first
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert panel(browser)[:2] == ["The", "token 1 of 200, not predicted: nothing stands before it"]


@pytest.mark.slow
@pytest.mark.heavy
def test_text_is_one_stop_of_the_tab_key_and_arrows_walk_in_it(browser, file):
    browser.open(file)
    browser.evaluate("document.querySelector('.worst li:last-child a').focus()")
    browser.press("Tab")
    assert focused(browser) == "t0"
    walk(browser, "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft")
    assert focused(browser) == "t2" and panel(browser)[0] == "␣</script>"
    described = "document.activeElement.getAttribute('aria-describedby')"
    assert browser.evaluate(described) == "panel"
    assert browser.evaluate("document.activeElement.getAttribute('aria-label')") == "␣</script>"
    walk(browser, "ArrowDown")
    below = focused(browser)
    assert browser.evaluate(f"document.getElementById('{below}').offsetTop > document.getElementById('t2').offsetTop")
    walk(browser, "ArrowUp")
    assert browser.evaluate("document.activeElement.offsetTop === document.getElementById('t2').offsetTop")
    walk(browser, "End", "ArrowRight", "ArrowDown")
    assert focused(browser) == "t199"
    assert browser.evaluate("document.querySelectorAll('#text [tabindex]').length") == 1
    assert browser.evaluate("document.querySelectorAll('[aria-selected]').length") == 1
    walk(browser, "Home", "ArrowLeft", "ArrowUp")
    assert focused(browser) == "t0"
    browser.press("Tab")
    assert not browser.evaluate("document.getElementById('text').contains(document.activeElement)")


@pytest.mark.slow
@pytest.mark.heavy
def test_list_of_the_worst_leads_to_their_tokens_by_key_and_by_pointer(browser, file):
    browser.open(file)
    browser.evaluate("document.querySelector('.worst').focus()")
    browser.press("Tab", "Tab", "Enter")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert focused(browser) == "t15" and "KL 9 nats" in panel(browser)[1]
    assert browser.evaluate(
        "(() => { const box = document.activeElement.getBoundingClientRect();"
        "return box.top > 0 && box.bottom < innerHeight; })()"
    )
    browser.evaluate("document.querySelector('.worst a').click()")
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert focused(browser) == "t7"
    walk(browser, "ArrowRight")
    browser.evaluate("document.querySelector('.worst a').click()")  # the same link once more
    browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert focused(browser) == "t7"


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_its_window_follows_the_scheme_and_asks_for_nothing(browser, file, width, scheme):
    browser.open(file, width=width, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert {url for url in browser.requests if not url.startswith("data:")} == {file.as_uri()}
    assert browser.messages == []
    paper = browser.evaluate("getComputedStyle(document.getElementById('t7')).backgroundColor")
    wanted = (LIGHT if scheme == "light" else DARK)[-1][0]
    assert paper == f"rgb({', '.join(str(int(wanted[i : i + 2], 16)) for i in (1, 3, 5))})"
    # the panel is seen together with the token that it is about, and does not cover it
    browser.evaluate("document.getElementById('t150').click()")
    token, beside = browser.evaluate(
        "['t150', 'panel'].map(id => document.getElementById(id).getBoundingClientRect().toJSON())"
    )
    assert beside["top"] >= 0 and beside["bottom"] <= 900 and token["top"] >= 0 and token["bottom"] <= 900
    assert token["right"] <= beside["left"] or token["bottom"] <= beside["top"]


@pytest.mark.slow
@pytest.mark.heavy
def test_ten_thousand_tokens_open_in_time_and_are_walked_at_once(browser, tmp_path):
    """Seconds are those of a busy machine with two cores; it takes a tenth of them."""
    path = tmp_path / "long.html"
    path.write_text(inspection_page(made(10_000)), encoding="utf-8")
    assert path.stat().st_size < 6e6
    began = time.perf_counter()
    browser.open(path)
    assert browser.evaluate("document.querySelectorAll('[role=option]').length") == 10_000
    opened = time.perf_counter() - began
    browser.evaluate("document.getElementById('t9000').click()")
    began = time.perf_counter()
    walk(browser, *["ArrowRight"] * 10, *["ArrowDown"] * 10)
    moved = (time.perf_counter() - began) / 20
    assert panel(browser)[1].startswith("KL ") and int(focused(browser)[1:]) > 9010
    print(f"opened in {opened:.2f} s, a move takes {moved * 1e3:.0f} ms")
    assert opened < 15 and moved < 1
