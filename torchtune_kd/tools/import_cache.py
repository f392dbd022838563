"""Command line of the importers: ``python -m torchtune_kd.tools.import_cache --help``."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from torchtune_kd.caches.states import FLOATS
from torchtune_kd.errors import as_user_errors, exit_with_message
from torchtune_kd.tools.importing import Options, import_cache, read_request
from torchtune_kd.tools.importing.run import FORMATS, Imported
from torchtune_kd.tools.importing.told import SMALLEST_TAIL


def main(argv: Sequence[str] | None = None) -> None:
    """Turn what another project stored of a teacher into a cache that a run reads with ``teacher_cache``."""
    args = _parse(argv)
    given = {each.name: getattr(args, each.name) for each in fields(Options)}
    with exit_with_message(), as_user_errors():
        request = read_request(args.format, args.source, args.output, args.config, args.overrides, Options(**given))
        imported = import_cache(request)
    for line in _lines(imported, args.output):
        print(line)


def _lines(imported: Imported, output: Path) -> list[str]:
    manifest, unknown = imported.manifest, imported.unknown
    unused = f"; {imported.unused:,} documents of the source are not among the data" if imported.unused else ""
    lines = [f"{output}: {manifest.stored} of {manifest.tokens:,} tokens in {manifest.documents:,} documents{unused}"]
    lines += [f"{output}: {each.found:,} of the {each.rows:,} rows of `{each.name}`" for each in imported.coverage]
    if imported.nats is not None:
        lines.append(f"{output}: the teacher predicts the tokens with {imported.nats:.3g} nats, by its states and head")
    if unknown:
        lines.append(
            f"{output}: the mass of the rest is not known for {unknown:,} tokens, so that a run needs `teacher_tail: "
            "renormalise`"
        )
    return lines


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torchtune_kd.tools.import_cache", description=main.__doc__)
    parser.add_argument("format", choices=tuple(FORMATS), help="what wrote the source")
    parser.add_argument("source", type=Path, help="a file, or a folder of them")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--config", required=True, help="of the run: a file, or a name that `tune ls` shows")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for keys of the config")
    parser.add_argument("--teacher-name", help="kept in the cache's manifest")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    parser.add_argument("--partial", action="store_true", help="also if rows of the config's data are missing")
    parser.add_argument(
        "--smallest-tail",
        type=float,
        default=SMALLEST_TAIL,
        help="a mass of the ids that are not stored below it counts as unknown (default: %(default)s)",
    )
    distillkit = parser.add_argument_group("distillkit")
    distillkit.add_argument("--compression", type=Path, help="compression config (default: the one beside the files)")
    distillkit.add_argument(
        "--exact-only",
        action="store_true",
        help="leave out the ids whose log-probabilities were fitted: their mass counts to the rest",
    )
    openai = parser.add_argument_group("openai")
    openai.add_argument(
        "--ambiguous-to-rest",
        action="store_true",
        help="leave tokens out that were not drawn and whose text is not that of one id",
    )
    axolotl = parser.add_argument_group("axolotl")
    axolotl.add_argument("--logprobs-field", default="logprobs", help="its key of that name (default: %(default)s)")
    axolotl.add_argument("--messages-field", default="messages", help="its field_messages (default: %(default)s)")
    hidden = parser.add_argument_group("vllm_hidden")
    hidden.add_argument("--layer", type=int, default=-1, help="of those in a file (default: the last)")
    hidden.add_argument("--dtype", choices=tuple(FLOATS), default="bf16", help="to store (default: %(default)s)")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    main()
