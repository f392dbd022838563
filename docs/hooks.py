"""Show mkdocstrings one tree of all that installs as ``torchtune_kd``, docstrings in Markdown; nothing is imported.

``kernels/`` stands beside the package in the repository and inside it once installed. Griffe, which reads the sources,
wants it inside. Docstrings are those of Sphinx in a few places (roles, formulas, a
table); their copies here are Markdown.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

SOURCES = {"torchtune_kd": "torchtune_kd", "torchtune_kd.kernels": "kernels"}  # package: folder, as in pyproject.toml

_trees: list[TemporaryDirectory] = []  # deleted when the program ends


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Copy the sources as they install, and have the reference read from the copy."""
    root = Path(config.config_file_path).parent
    _trees.append(TemporaryDirectory(prefix="torchtune-kd-docs-"))
    for package, folder in SOURCES.items():
        target = Path(_trees[-1].name, *package.split("."))
        for file in sorted((root / folder).rglob("*.py")):
            copy = target / file.relative_to(root / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(markdown(file.read_text()))
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [_trees[-1].name]
    return config


def markdown(source: str) -> str:
    """Return Python source whose docstrings are Markdown where they were reStructuredText."""
    source = re.sub(r":(?:func|class|meth|mod|data|attr|exc):`(~?)([^`]+)`", _role, source)
    source = re.sub(r":math:`([^`]+)`", lambda match: f"`{_formula(match[1])}`", source)
    source = re.sub(r"(\w)::$", r"\1:", source, flags=re.MULTILINE)  # a block of code follows
    source = re.sub(r"\.\. math:: (.+)", lambda match: f"`{_formula(match[1])}`", source)
    return re.sub(r"^( *)=+ [ =]+\n(?:.*\n)*?\1=+ [ =]+\n((?:.*\n)*?)\1=+ [ =]+$", _table, source, flags=re.MULTILINE)


def _role(match: re.Match[str]) -> str:
    name = match[2].rpartition(".")[2] if match[1] else match[2]
    return f"`{name}`"


def _formula(latex: str) -> str:
    for pattern, plain in ((r"\\mathrm\{(\w+)\}", r"\1"), (r"\\alpha", "α"), (r"\\,", " · "), (r"\^2", "²")):
        latex = re.sub(pattern, plain, latex)
    return latex


def _table(match: re.Match[str]) -> str:
    """Turn a simple table, whose columns its rulers mark, into one of Markdown."""
    indent, lines = match[1], match[0].split("\n")
    columns = [ruler.span() for ruler in re.finditer("=+", lines[0])]
    ends = [start for start, _ in columns[1:]] + [None]
    rows: list[list[str]] = []
    for line in lines[1:-1]:
        if line.strip("= "):
            cells = [line[start:end].strip() for (start, _), end in zip(columns, ends, strict=True)]
            if cells[0]:
                rows.append(cells)
            else:  # goes on with the row above
                rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
    head, *body = (f"{indent}| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"{indent}|{'---|' * len(columns)}", *body])
