"""The frame of a page that is one file: it asks no server for anything, and follows the reader's light or dark."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from typing import Any

# Colours have a contrast of 4.5 to 1 at least (WCAG AA) on `--paper` and on `--panel`.
_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --panel: #f4f5f7; --line: #d5dae1; --ink: #1b1f24; --soft: #566070;
  --accent: #0a58a8; --good: #17692e; --bad: #ab2014;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1e2228; --line: #3a414b; --ink: #e7e9ec; --soft: #a7afba;
    --accent: #7cbaff; --good: #6ccb82; --bad: #ff9486;
  }
}
*, ::before, ::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; overflow-wrap: anywhere; }
h1 { margin: 0 0 1rem; font-size: clamp(1.5rem, 1.1rem + 1.6vw, 2.1rem); }
h2 { margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); font-size: 1.35rem; }
h3 { margin: 2rem 0 .5rem; font-size: 1.1rem; }
p, ul, ol { max-width: 46rem; margin: .5rem 0; }
li { margin: .25rem 0; }
a { color: var(--accent); }
code { font: .92em ui-monospace, monospace; overflow-wrap: anywhere; }
figure { margin: 1.25rem 0; }
figcaption, .soft { color: var(--soft); font-size: .92rem; }
.scroll { overflow-x: auto; max-width: 100%; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
@media print { .scroll { overflow: visible; } main { max-width: none; padding: 0; } }
"""


def escape(text: Any) -> str:
    """Return ``text`` as it can stand in HTML, between tags and in a quoted attribute."""
    return html.escape(str(text), quote=True)


def page(title: str, body: str, *, style: str = "", script: str = "", data: Mapping[str, Any] | None = None) -> str:
    """Return a whole HTML page.

    A content security policy lets the browser refuse what would leave the page, and every script but ``script``.
    The style may use the frame's variables ``--paper --panel --line --ink --soft --accent --good --bad``, and what is
    wider than a phone goes into ``<div class="scroll" tabindex="0">``.

    Args:
        title (str): plain text, of the window and of the page's heading.
        body (str): HTML below the heading; :func:`escape` what comes from elsewhere.
        style (str): CSS after the frame's own.
        script (str): JavaScript, run once the body is there.
        data (Mapping[str, Any] | None): what the script reads, without NaN, by
            ``JSON.parse(document.getElementById("data").textContent)``.
    """
    script = f"\n{script.strip()}\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
<script type="application/json" id="data">{_embedded(data or {})}</script>
<script>{script}</script>
</body>
</html>
"""


def _embedded(data: Mapping[str, Any]) -> str:
    """Return JSON that cannot end the script element it stands in: every ``<`` is written as its code point."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
