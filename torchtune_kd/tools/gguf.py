"""Command line of the GGUF conversion: ``python -m torchtune_kd.tools.gguf --help``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from torchtune_kd.errors import as_user_errors, exit_with_message
from torchtune_kd.tools.gguf_reader import gguf_to_hf

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the model and tokenizer of a GGUF file as a Hugging Face checkpoint folder."""
    args = _parse(argv)
    with exit_with_message(), as_user_errors():
        folder = gguf_to_hf(args.gguf_path, args.output_dir, _DTYPES[args.dtype], overwrite=args.overwrite)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    print(
        f"{folder}: {args.gguf_path.name} as a Hugging Face checkpoint of {config['num_hidden_layers']} layers in "
        f"{args.dtype}: {files}"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torchtune_kd.tools.gguf", description=main.__doc__)
    parser.add_argument("gguf_path", type=Path, help="GGUF file of a Llama-architecture model")
    parser.add_argument("output_dir", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the written weights (default: bf16)")
    parser.add_argument("--overwrite", action="store_true", help="replace another checkpoint in the output folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
