"""Command line of layer pruning: ``python -m torchtune_kd.models.prune --help``."""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torchtune.config._utils import _get_component_from_path
from torchtune.training import MODEL_KEY, FullModelHFCheckpointer

from torchtune_kd.models._folders import check_output_dir
from torchtune_kd.models._kept_layers import prune_checkpoint, read_config, safetensors_files
from torchtune_kd.models.pruning import MEASURES, select_layers, text_batches


def main(argv: Sequence[str] | None = None) -> None:
    """Write a student checkpoint with some of a teacher's layers."""
    args = _parse(argv)
    try:
        num_layers = read_config(args.checkpoint_dir)["num_hidden_layers"]
        check_output_dir(args.output_dir, args.checkpoint_dir, overwrite=args.overwrite)  # measuring may take minutes
        influence = _measure(args) if args.strategy in MEASURES else None
        layers = select_layers(num_layers, args.num_layers, args.strategy, influence)
        folder = prune_checkpoint(args.checkpoint_dir, args.output_dir, layers, overwrite=args.overwrite)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{folder}: kept {len(layers)} of {num_layers} layers: {' '.join(map(str, layers))}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m torchtune_kd.models.prune", description=main.__doc__)
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


def _measure(args: argparse.Namespace) -> torch.Tensor:
    tokenizer = _component(args.tokenizer)(str(args.tokenizer_path or args.checkpoint_dir / "tokenizer.json"))
    if not args.text.is_file():
        raise ValueError(f"Expected a calibration text, but {args.text} does not exist; check the path.")
    model = _component(args.model)()
    text = args.text.read_text(encoding="utf-8")
    batches = text_batches(tokenizer, text, seq_len=min(256, model.max_seq_len))
    with tempfile.TemporaryDirectory() as unused:  # the checkpointer creates its output folder
        checkpointer = FullModelHFCheckpointer(
            checkpoint_dir=str(args.checkpoint_dir),
            checkpoint_files=[file.name for file in safetensors_files(args.checkpoint_dir)],
            model_type=args.model_type,
            output_dir=unused,
        )
        model.load_state_dict(checkpointer.load_checkpoint()[MODEL_KEY])
    return MEASURES[args.strategy](model, batches)


def _component(dotpath: str) -> Callable[..., Any]:
    try:
        return _get_component_from_path(dotpath)
    except Exception as error:  # torchtune raises several kinds here
        raise ValueError(
            f"Expected a component such as torchtune_kd.models.smollm2.smollm2_135m, but {dotpath!r} cannot be "
            f"imported ({error}); check the name."
        ) from error


if __name__ == "__main__":
    main()
