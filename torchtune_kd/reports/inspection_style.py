"""Colours, layout and script of the inspection page."""

EDGES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # nats; a KL at or above n of them has the n-th colour, below all none

# (background, ink), the smallest KL first. Lightness alone tells the colours apart, also for the colour blind: they
# darken on light paper and lighten on dark paper. Ink has a contrast of 4.5 to 1 at least (WCAG AA).
LIGHT = (
    ("#fff6cc", "#1b1f24"),
    ("#fee79b", "#1b1f24"),
    ("#fecb5c", "#1b1f24"),
    ("#f79433", "#1b1f24"),
    ("#bd4a06", "#ffffff"),
    ("#6e2003", "#ffffff"),
)
DARK = (
    ("#2c210f", "#e7e9ec"),
    ("#4a3410", "#e7e9ec"),
    ("#6f4a0e", "#ffffff"),
    ("#965c0d", "#ffffff"),
    ("#e0942a", "#14171b"),
    ("#ffecb0", "#14171b"),
)


def _rules(colours: tuple[tuple[str, str], ...]) -> str:
    return "\n".join(
        f".k{number} {{ background: {paper}; color: {ink}; fill: {paper}; }}"
        for number, (paper, ink) in enumerate(colours, start=1)
    )


STYLE = (
    f"""
.k0 {{ fill: var(--panel); }}
{_rules(LIGHT)}
@media (prefers-color-scheme: dark) {{
{_rules(DARK)}
}}
.k0, .k1, .k2, .k3, .k4, .k5, .k6 {{ forced-color-adjust: none; }}
"""
    + """
h2 { margin-top: 1.75rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: .6rem .8rem;
  background: var(--panel); border-radius: .4rem; }
.tiles dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.tiles dt { color: var(--soft); font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; }
.overview { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 0 2.5rem; }
.worst { max-height: 23rem; overflow-y: auto; padding-left: 2.2rem; }
.worst li { margin: 0 0 .6rem; }
.worst b { padding: 0 .3em; border-radius: .2em; font-variant-numeric: tabular-nums; }
.worst a { color: inherit; font: .88rem ui-monospace, monospace; text-decoration: none; overflow-wrap: anywhere; }
.worst a:hover mark, .worst a:focus mark { text-decoration: underline; }
.worst mark { background: none; color: var(--accent); font-weight: bold; }
.worst small { display: block; color: var(--soft); overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 10px system-ui, sans-serif; text-anchor: middle; }
svg rect { stroke: var(--soft); stroke-width: .75; }
svg path { stroke: var(--soft); fill: none; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem; max-width: none; padding: 0; list-style: none; }
.legend li { margin: 0; padding: .1rem .6rem; border: 1px solid var(--line); border-radius: .2rem;
  font-size: .88rem; font-variant-numeric: tabular-nums; }
.reader { display: grid; grid-template-columns: minmax(0, 1fr) 23rem; gap: 1.5rem; margin-top: 1rem; }
#text { font: .92rem/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
#text span { scroll-margin-block: 25vh 45vh; border-radius: .15em; cursor: default; }
#text span:hover { outline: 1px solid var(--ink); }
#text [aria-selected] { outline: 2px solid var(--accent); outline-offset: 1px; }
#text i { font-style: normal; opacity: .7; user-select: none; }
.window { padding: 0 .35em; border: 1px dashed var(--soft); border-radius: .3em; color: var(--soft);
  font: .72rem system-ui, sans-serif; user-select: none; }
#panel { position: sticky; top: 1rem; align-self: start; max-height: calc(100vh - 2rem); overflow-y: auto;
  padding: .9rem 1rem; background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; }
#panel h3 { margin: 0; font: bold 1.05rem ui-monospace, monospace; white-space: pre-wrap; }
#panel h4 { margin: .8rem 0 .25rem; font-size: .92rem; }
#panel p { margin: .15rem 0; color: var(--soft); font-size: .88rem; }
#panel ol { margin: 0; padding: 0; list-style: none; font-size: .88rem; }
#panel li { position: relative; display: flex; gap: .4rem; margin: 0 0 2px; padding: .12rem .4rem .12rem 1.4rem; }
#panel li > * { position: relative; }
#panel li > .mark { position: absolute; left: .35rem; color: var(--good); }
#panel li > .bar { position: absolute; inset: 0 auto 0 0;
  background: color-mix(in srgb, var(--accent) 28%, transparent); }
#panel bdi { flex: 1; font-family: ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
#panel .actual { font-weight: bold; }
#panel .below { margin-top: .35rem; }
.said { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 60rem) {
  .overview { grid-template-columns: minmax(0, 1fr); }
  .worst { max-height: 17rem; }
  .reader { grid-template-columns: minmax(0, 1fr); gap: .75rem; }
  #panel { top: auto; bottom: 0; max-height: 45vh; margin: 0 -.5rem; padding: .5rem .6rem;
    box-shadow: 0 -.3rem 1rem rgb(0 0 0 / .2); }
  #panel .both { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: .5rem; }
  #panel h4 { margin-top: .2rem; }
  #panel ol, #panel p { font-size: .8rem; }
}
"""
)

SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text"), panel = document.getElementById("panel");
const tokens = text.querySelectorAll("[role=option]");
const attributes = ["tabindex", "aria-selected", "aria-label", "aria-describedby"];  // of the current token alone
let current = 0;

function make(tag, name, content) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (content !== undefined) element.textContent = content;
  return element;
}

function percent(p) {
  if (p > 0 && p < 1e-6) return "<0.0001 %";
  return Number((100 * p).toPrecision(p < 0.001 ? 1 : p < 0.1 ? 2 : 3)) + " %";
}

function row(piece, p, isActual) {
  const item = make("li", isActual ? "actual" : ""), bar = make("span", "bar");
  bar.style.width = 100 * p + "%";
  item.append(bar, make("bdi", "", piece), make("span", "", percent(p)));
  if (isActual) {
    const mark = make("span", "mark", "\u2713");
    mark.append(make("span", "said", "the token of the text"));
    item.append(mark);
  }
  return item;
}

function expected(name, guess, place) {
  const [actual, ...likeliest] = guess, box = make("div"), rows = make("ol");
  let isListed = false;
  for (let k = 0; k < likeliest.length; k += 2) {
    const isActual = likeliest[k] === data.ids[place];
    isListed ||= isActual;
    rows.append(row(data.pieces[likeliest[k]], likeliest[k + 1], isActual));
  }
  if (!isListed) {
    const below = row(data.labels[place], actual, true);
    below.classList.add("below");
    rows.append(below);
  }
  box.append(make("h4", "", name + " expects"), rows);
  return box;
}

function show(place) {
  const guesses = data.guesses[place], both = make("div", "both"), number = n => n.toLocaleString("en");
  let facts = "token " + number(place + 1) + " of " + number(tokens.length);
  if (guesses) {
    facts = "KL " + Number(data.kl[place].toPrecision(3)) + " nats, " + facts;
    facts += ", from " + number(data.contexts[place]) + " tokens before it";
    both.append(expected(data.reference, guesses[0], place), expected(data.student, guesses[1], place));
  } else {
    facts += ", not predicted: nothing stands before it";
  }
  panel.replaceChildren(make("h3", "", data.labels[place]), make("p", "", facts), both);
}

// One token of all can be reached by Tab (roving tabindex); the panel describes it to a screen reader.
function select(place, takesFocus = true) {
  for (const name of attributes) tokens[current].removeAttribute(name);
  current = place;
  tokens[place].tabIndex = 0;
  tokens[place].setAttribute("aria-selected", "true");
  tokens[place].setAttribute("aria-label", data.labels[place]);
  tokens[place].setAttribute("aria-describedby", "panel");
  show(place);
  if (takesFocus) tokens[place].focus();
}

function placeOf(event) {
  const token = event.target.closest("[role=option]");
  return token ? Number(token.id.slice(1)) : null;
}

// The token of the next line (step 1) or the one before (step -1) that begins nearest to this one's left edge.
function acrossLines(step) {
  const from = tokens[current].getClientRects()[0];
  let best = current, smallest = Infinity, top = null;
  for (let place = current + step; place in tokens; place += step) {
    const box = tokens[place].getClientRects()[0];
    if ((box.top - from.top) * step < from.height / 2) continue;
    top ??= box.top;
    if (Math.abs(box.top - top) > box.height / 2) break;
    const distance = Math.abs(box.left - from.left);
    if (distance < smallest) [best, smallest] = [place, distance];
  }
  return best;
}

const moves = {
  ArrowLeft: () => Math.max(current - 1, 0),
  ArrowRight: () => Math.min(current + 1, tokens.length - 1),
  ArrowUp: () => acrossLines(-1),
  ArrowDown: () => acrossLines(1),
  Home: () => 0,
  End: () => tokens.length - 1,
};

text.addEventListener("keydown", event => {
  if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  select(moves[event.key]());
});
text.addEventListener("mouseover", event => {
  const place = placeOf(event);
  if (place !== null) show(place);
});
text.addEventListener("mouseleave", () => show(current));
text.addEventListener("click", event => {
  const place = placeOf(event);
  if (place !== null) select(place);
});
text.addEventListener("focusin", event => {
  const place = placeOf(event);
  if (place !== null && place !== current) select(place, false);
});

// Links to tokens carry focus along; Back returns.
function followLink() {
  const place = Number(/^#t(\\d+)$/.exec(location.hash)?.[1] ?? NaN);
  if (place in tokens) select(place);
}
addEventListener("hashchange", followLink);
document.querySelector(".worst").addEventListener("click", event => {
  if (event.target.closest("a")) requestAnimationFrame(followLink);  // also where the link was followed before
});

select(0, false);
followLink();
"""
