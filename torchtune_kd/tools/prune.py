"""Command line of layer pruning: ``python -m torchtune_kd.tools.prune --help``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from torchtune_kd.errors import as_user_errors, exit_with_message
from torchtune_kd.storage.atomic import check_output_dir
from torchtune_kd.tools.kept_layers import prune_checkpoint
from torchtune_kd.tools.layer_choice import MEASURES, select_layers, text_batches
from torchtune_kd.tools.prune_inputs import (
    build_model,
    build_tokenizer,
    check_checkpoint,
    check_model_type,
    load_weights,
    read_text,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Write a student checkpoint with some of a teacher's layers."""
    args = _parse(argv)
    with exit_with_message(), as_user_errors():
        num_layers = check_checkpoint(args.checkpoint_dir)
        select_layers(num_layers, args.num_layers)  # measuring may take minutes: what can be refused is, before it
        check_output_dir(args.output_dir, args.checkpoint_dir, overwrite=args.overwrite)
        influence = _measure(args) if args.strategy in MEASURES else None
        layers = select_layers(num_layers, args.num_layers, args.strategy, influence)
        folder = prune_checkpoint(args.checkpoint_dir, args.output_dir, layers, overwrite=args.overwrite)
    print(f"{folder}: kept {len(layers)} of {num_layers} layers: {' '.join(map(str, layers))}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torchtune_kd.tools.prune", description=main.__doc__)
    parser.add_argument("--checkpoint-dir", type=Path, required=True, help="Hugging Face folder of the teacher")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--num-layers", type=int, required=True, help="layers to keep")
    parser.add_argument("--strategy", choices=("even", *MEASURES), required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    measured = parser.add_argument_group("to measure layers, for every strategy but even")
    measured.add_argument("--model", help="the teacher's builder, e.g. torchtune_kd.models.smollm2.smollm2_135m")
    measured.add_argument("--model-type", default="LLAMA3_2", help="as in a checkpointer config")
    measured.add_argument("--tokenizer", help="e.g. torchtune_kd.models.smollm2.smollm2_tokenizer")
    measured.add_argument("--tokenizer-path", help="default: tokenizer.json of the checkpoint")
    measured.add_argument("--text", type=Path, help="calibration text, a UTF-8 file")
    args = parser.parse_args(argv)
    missing = [name for name in ("model", "tokenizer", "text") if getattr(args, name) is None]
    if args.strategy in MEASURES and missing:
        parser.error(f"--strategy {args.strategy} measures the teacher and needs --{', --'.join(missing)}")
    return args


def _measure(args: argparse.Namespace) -> Tensor:
    check_model_type(args.model_type)
    text = read_text(args.text)
    tokenizer = build_tokenizer(args.tokenizer, args.tokenizer_path or args.checkpoint_dir / "tokenizer.json")
    model = build_model(args.model)
    batches = text_batches(tokenizer, text, seq_len=min(256, model.max_seq_len))
    load_weights(model, args.model, args.checkpoint_dir, args.model_type)
    return MEASURES[args.strategy](model, batches)


if __name__ == "__main__":
    main()
