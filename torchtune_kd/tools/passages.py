"""Text into passages to train on, to tune by and to judge by: ``python -m torchtune_kd.tools.passages --help``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torchtune_kd.data import prose
from torchtune_kd.errors import as_user_errors, exit_with_message
from torchtune_kd.tools.prune_inputs import build_tokenizer

FILES = ("train.jsonl", "val.jsonl", "heldout.jsonl")


def main(argv: Sequence[str] | None = None) -> None:
    """Write train.jsonl, val.jsonl and heldout.jsonl, passages of a text; no paragraph is in two of them."""
    args = _parse(argv)
    with exit_with_message(), as_user_errors():
        tokenizer = build_tokenizer(args.tokenizer, args.tokenizer_path)
        documents = prose.reference_documents() if args.text is None else prose.read_documents(args.text)
        judged = prose.split_documents(documents, args.held_out)
        tuned = prose.split_documents(judged.train, args.held_out)
        rows = len(prose.passages(tokenizer, prose.joined(tuned.train), args.tokens))
        parts = (
            prose.training_passages(tokenizer, tuned.train, args.tokens, rows * args.passes),
            prose.passages(tokenizer, prose.joined(tuned.held_out), args.tokens),
            prose.passages(tokenizer, prose.joined(judged.held_out), args.tokens),
        )
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for name, part in zip(FILES, parts, strict=True):
            prose.write_rows(args.output_dir / name, part)
    for name, part in zip(FILES, parts, strict=True):
        print(f"{args.output_dir / name}: {len(part)} passages of at most {args.tokens} tokens")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torchtune_kd.tools.passages", description=main.__doc__)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write the three files into")
    parser.add_argument("--tokenizer", required=True, help="e.g. torchtune_kd.models.smollm2.smollm2_tokenizer")
    parser.add_argument("--tokenizer-path", required=True, help="its file, e.g. a checkpoint's tokenizer.json")
    parser.add_argument("--text", type=Path, help="a UTF-8 file (default: the reference prose that comes with Python)")
    parser.add_argument("--tokens", type=int, default=255, help="of a passage, at most (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=1, help="over the training text, each cut at other places")
    parser.add_argument("--held-out", type=float, default=0.05, help="share of each of the two others (default: 0.05)")
    args = parser.parse_args(argv)
    if args.tokens < 1 or args.passes < 1 or not 0 < args.held_out < 0.5:
        parser.error("--tokens and --passes are at least 1, and --held-out is between 0 and 0.5")
    return args


if __name__ == "__main__":
    main()
