"""The page of an inspection: a text coloured by KL, and what both models expect at the token under pointer or focus."""

import bisect
import math
import statistics
import unicodedata
from collections.abc import Sequence
from typing import Any

from torchtune_kd.reports.inspected import Guess, Inspection, Prediction, Token
from torchtune_kd.reports.inspection_style import EDGES, SCRIPT, STYLE
from torchtune_kd.reports.page import escape, page

WORST = 20  # tokens in the list
# The histogram's bins end at these, nats; every edge between two colours is one of them.
BINS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_VISIBLE = {ord(" "): "␣", ord("\n"): "↵", ord("\t"): "⇥", ord("\r"): "\\r"}
_PART = "◦"  # stands for a token within a character of several tokens


def inspection_page(found: Inspection) -> str:
    """Return the page as HTML."""
    student, reference = found.student.name, found.reference.name
    body = "\n".join((_summary(found), _overview(found), _text(found)))
    return page(f"{student} against {reference}, token by token", body, style=STYLE, script=SCRIPT, data=_data(found))


def shown(piece: str) -> str:
    """Return what a token writes with its whitespace and control characters made visible."""
    return "".join(c if _is_seen(c) else f"⟨{ord(c):04X}⟩" for c in piece.translate(_VISIBLE))


def _is_seen(character: str) -> bool:
    return character.isprintable() and not "\ufe00" <= character <= "\ufe0f"  # variation selectors


def level(kl: float | None) -> int:
    """Return the colour of a KL: 0, which is none, to ``len(EDGES)``."""
    return 0 if kl is None else bisect.bisect_right(EDGES, kl)


def _summary(found: Inspection) -> str:
    student, reference = found.student, found.reference
    figures = (
        (f"{len(found.tokens):,}", "tokens"),
        (escape(_figure(found.kl)), f"nats: mean KL({escape(reference.name)} ‖ {escape(student.name)})"),
        (_share(found.agreement), "agreement: both find the same token likeliest"),
        (_figure(found.student_perplexity), f"perplexity of {escape(student.name)}"),
        (_figure(found.reference_perplexity), f"perplexity of {escape(reference.name)}"),
    )
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for value, name in figures)
    return f"""<p>At every token of <strong>{escape(found.text)}</strong> this page compares what
<strong>{escape(student.name)}</strong> (<code>{escape(student.folder)}</code>) and
<strong>{escape(reference.name)}</strong> (<code>{escape(reference.folder)}</code>) expect there, given the text before
it.</p>
<dl class="tiles">{tiles}</dl>"""


def _overview(found: Inspection) -> str:
    values = sorted(prediction.kl for prediction in found.predictions)
    worst_tenth, total = values[-math.ceil(len(values) / 10) :], math.fsum(values)
    carried = f"; the worst tenth makes {_share(math.fsum(worst_tenth) / total)} of the sum" if total else ""
    return f"""<div class="overview">
<section aria-labelledby="worst"><h2 id="worst">Where they differ most</h2>
<ol class="worst scroll" tabindex="0" aria-labelledby="worst">{_worst(found)}</ol></section>
<section aria-labelledby="how-far"><h2 id="how-far">How far apart</h2>
<figure>{_histogram(values)}
<figcaption>KL of the tokens, nats. Half of them are below {escape(_figure(statistics.median(values)))}, a tenth has
{escape(_figure(worst_tenth[0]))} or more{carried}.</figcaption></figure></section>
</div>"""


def _worst(found: Inspection) -> str:
    """Return the tokens of the largest KL, each a link to its place, with what both models expected."""
    places = [place for place, token in enumerate(found.tokens) if token.prediction is not None]
    places.sort(key=lambda place: -found.tokens[place].prediction.kl)
    items = []
    for place in places[:WORST]:
        prediction = found.tokens[place].prediction
        before, after = (
            shown("".join(token.text for token in part)).replace("␣", " ")
            for part in (found.tokens[max(place - 20, 0) : place], found.tokens[place + 1 : place + 11])
        )
        expected = " · ".join(
            f"{escape(name)} <bdi>{escape(_piece(found, guess.likeliest[0][0]))}</bdi> {_share(guess.likeliest[0][1])}"
            for name, guess in (
                (found.reference.name, prediction.reference),
                (found.student.name, prediction.student),
            )
        )
        items.append(
            f'<li><b class="k{level(prediction.kl)}">{escape(_figure(prediction.kl))}</b> <a href="#t{place}">'
            f"{escape(before[-32:])}<mark>{escape(shown(found.tokens[place].text) or _PART)}</mark>{escape(after[:16])}"
            f"</a><small>{expected}</small></li>"
        )
    return "\n".join(items)


def _histogram(values: Sequence[float]) -> str:
    """Return bars of the number of tokens between the edges of BINS as SVG."""
    counts = [0] * (len(BINS) + 1)
    for value in values:
        counts[bisect.bisect_right(BINS, value)] += 1
    step, height = 28, 150  # of a bin, and of the tallest bar
    bars, ticks = [], []
    for number, count in enumerate(counts):
        low, high = (0.0, *BINS)[number], (*BINS, math.inf)[number]
        label = f"{low:g} to {high:g} nats" if high < math.inf else f"{low:g} nats and more"
        tall = height * count / max(counts)
        top = height + 20 - tall
        bars.append(
            f"<g><title>{label}: {count} tokens, {_share(count / len(values))}</title>"
            f'<rect class="k{level(low)}" x="{number * step + 1.5}" y="{top:.1f}" width="{step - 3}" '
            f'height="{tall:.1f}"/>'
            f'<text x="{(number + 0.5) * step}" y="{top - 5:.1f}">{count or ""}</text></g>'
        )
    for number, edge in enumerate(BINS, start=1):
        is_decade = f"{edge:g}".strip("0.") == "1"
        ticks.append(f'<path d="M{number * step} {height + 20}v{6 if is_decade else 3}"/>')
        if is_decade:
            ticks.append(f'<text x="{number * step}" y="{height + 38}">{edge:g}</text>')
    wide = step * len(counts)
    return (
        f'<svg viewBox="0 0 {wide} {height + 44}" role="img" aria-label="Histogram of the KL of {len(values)} tokens">'
        f'{"".join(bars)}<path d="M0 {height + 20}h{wide}"/>{"".join(ticks)}</svg>'
    )


def _text(found: Inspection) -> str:
    names = ["0", *(f"{edge:g}" for edge in EDGES)]
    chips = "".join(
        f'<li class="k{number}">{names[number]}{"–" + names[number + 1] if number < len(EDGES) else " and more"}</li>'
        for number in range(len(names))
    )
    windows = dict(zip(found.windows, range(2, len(found.windows) + 2), strict=True))
    spans = []
    for place, token in enumerate(found.tokens):
        if place in windows:
            spans.append(f'<b class="window" aria-hidden="true">window {windows[place]}</b>')
        colour = level(token.prediction and token.prediction.kl)
        stop = "" if place else ' tabindex="0"'
        spans.append(f'<span id="t{place}" class="k{colour}" role="option"{stop}>{_written(token)}</span>')
    note = f"""<p>The text is longer than a window of the models. They read it in windows that overlap by half: where
<b class="window">window n</b> stands, the context begins anew, {found.overlap:,} tokens or more before it, so that
no token after the first window is predicted from less.</p>"""
    return f"""<section aria-labelledby="the-text"><h2 id="the-text">The text</h2>
<p>A token's colour is the KL of the two predictions of it, in nats over the whole vocabulary: 0 where they are the
same.</p>
<ul class="legend" aria-label="Colours of the KL in nats">{chips}</ul>
<p class="soft">Point at a token, or walk with the arrow keys, Home and End. Among what the models expect, ✓ is the
token of the text. ␣ is a space, ↵ the end of a line, {_PART} a further token of the same character.</p>
{note if windows else ""}
<div class="reader">
<div id="text" role="listbox" aria-label="Tokens of the text" aria-orientation="horizontal">{"".join(spans)}</div>
<aside id="panel" aria-label="What the models expect"></aside>
</div></section>"""


def _piece(found: Inspection, index: int) -> str:
    """Return what a vocabulary id writes, visibly; with the id where it is only some bytes of a character."""
    piece = found.pieces[index]
    return shown(piece) + (f" id {index}" if "\ufffd" in piece else "")


def _written(token: Token) -> str:
    """Return a token's HTML, in which line ends and tabs get a sign, and what cannot be seen its code."""
    if not token.text:
        return f"<i>{_PART}</i>"
    is_hidden = not any(map(_is_seen, token.text))
    return "".join(_character(character, is_hidden) for character in token.text)


def _character(character: str, is_hidden: bool) -> str:
    """Return the HTML of a character; a joiner, for example, gets its code only in a token that is all hidden."""
    if character in "\n\t":
        return f"<i>{shown(character)}</i>{character}"
    is_control = unicodedata.category(character) == "Cc"  # HTML would take \r for one more line end
    if _is_seen(character) or not (is_hidden or is_control):
        return escape(character)
    return f"<i>{shown(character)}</i>"


def _data(found: Inspection) -> dict[str, Any]:
    """Return what the script reads: lists by token, with the figures rounded to four digits."""
    labels, character = [], ""
    for token in found.tokens:
        character = shown(token.text) or character
        labels.append(character if token.text else f"{_PART} a further token of {character}")
    return {
        "student": found.student.name,
        "reference": found.reference.name,
        "pieces": {index: _piece(found, index) for index in found.pieces},
        "ids": [token.id for token in found.tokens],
        "labels": labels,
        "contexts": [token.context for token in found.tokens],
        "kl": [token.prediction and _rounded(token.prediction.kl) for token in found.tokens],
        "guesses": [token.prediction and _both(token.prediction) for token in found.tokens],
    }


def _both(prediction: Prediction) -> list[list[float]]:
    return [_flat(prediction.reference), _flat(prediction.student)]


def _flat(guess: Guess) -> list[float]:
    """Return the probability of the text's token, then ids and probabilities in turn."""
    return [_rounded(guess.probability), *(number for index, p in guess.likeliest for number in (index, _rounded(p)))]


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _figure(value: float) -> str:
    """Return three digits; ∞ beyond a float."""
    if 0 < value < 0.001:
        return "<0.001"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def _share(value: float) -> str:
    return f"{100 * value:.{0 if value >= 0.1 else 1}f} %"
