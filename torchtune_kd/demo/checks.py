"""What can be known to be wrong before anything is downloaded or written."""

import argparse
from importlib.util import find_spec

from torchtune_kd.demo.output import DemoError

# What the demo itself says to the recipe, and what to write instead.
_SET_BY_THE_DEMO = {
    "output_dir": "name the folder by --output-dir",
    "data_dir": "name the folder by --output-dir, and your text by --text",
    "student_dir": "name the folder by --output-dir",
    "teacher_dir": "name the folder by --teacher-dir",
    "teacher_cache": "pass --cached",
    "epochs": "leave it out, since the demo writes as much text as it trains on",
    "max_minutes": "leave it out, since the demo ends by its own clock, or set --steps",
    "model.num_layers": "leave it out, since the demo makes a student of 15 layers",
    "run_val_every_n_steps": "leave it out, since the demo validates three times while training",
}


def check_arguments(args: argparse.Namespace) -> None:
    """Check the arguments by themselves, and the packages they need; quick.

    Raises:
        DemoError: naming the first argument that cannot be.
    """
    if args.steps is not None and args.steps < 1:
        raise DemoError(f"Expected --steps of at least 1, but got {args.steps}: raise it.")
    for override in args.overrides:
        key, equals, _ = override.partition("=")
        if not (key and equals):
            raise DemoError(f"Expected key=value, but got {override!r}: write for example optimizer.lr=1e-3.")
        if key.startswith("cache."):
            raise DemoError(
                f"Expected no {override}, because the demo trains from exact states: leave it out, or run "
                "torchtune_kd/cache_teacher yourself."
            )
        if key in _SET_BY_THE_DEMO:
            raise DemoError(f"Expected no {override}, because the demo sets {key}: {_SET_BY_THE_DEMO[key]}.")
    needed = ["matplotlib", "rich"]
    if args.teacher_dir is None:
        needed.append("huggingface_hub" if args.teacher_hub else "gguf")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise DemoError(
            f"The demo needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: run "
            '`pip install "torchtune-kd[demo]"`.'
        )


def check_inputs(args: argparse.Namespace) -> None:
    """Temperature, overrides, the teacher's folder and the text, as the stages will use them.

    Raises:
        DemoError: naming the first of them that cannot be.
        ImportError: if what the stages import is not there.
    """
    # these import torch
    from torchtune_kd.data import prose
    from torchtune_kd.demo import teacher
    from torchtune_kd.errors import UserError
    from torchtune_kd.kernels import TEMPERATURES

    low, high = TEMPERATURES
    if args.temperature is not None and not low <= args.temperature <= high:
        raise DemoError(
            f"Expected a --temperature from {low:g} to {high:g}, but got {args.temperature:g}: choose one in between."
        )
    if args.teacher_dir is not None:
        teacher.checked(args.teacher_dir.resolve())
    if args.text is not None:
        try:
            prose.split_documents(prose.read_documents(args.text))
        except UserError as error:
            raise DemoError(str(error)) from error
    if args.overrides:
        _check_overrides(args.overrides, by_the_clock=args.steps is None)


def _check_overrides(overrides: list[str], *, by_the_clock: bool) -> None:
    """Check the run's config with these overrides; no file is read, of the components only the small ones are built."""
    import torch
    from omegaconf.errors import OmegaConfBaseException

    import torchtune_kd.training as kd
    from torchtune_kd.demo.train import read_config
    from torchtune_kd.errors import first_line
    from torchtune_kd.training.optim import check_optimizer

    written = " ".join(overrides)
    try:
        config = read_config([*overrides, "max_minutes=1"] if by_the_clock else overrides)
    except Exception as error:  # OmegaConf and YAML raise several kinds
        raise DemoError(
            f"Expected key=value overrides in YAML, but {written} cannot be read ({first_line(error)}): correct them."
        ) from error
    try:
        read = kd.read_config(config, distributed=False)
        read.kd_loss.build()
        check_optimizer(read, torch.device("cpu"))
    except (kd.UserError, OmegaConfBaseException) as error:
        raise DemoError(f"The overrides {written} cannot be used ({first_line(error)}): correct them.") from error
    length = config.tokenizer.max_seq_len
    if not isinstance(length, int) or length < 2:
        raise DemoError(f"Expected tokenizer.max_seq_len of at least 2, but got {length!r}: change it.")
