"""Tasks by name."""

from collections.abc import Callable
from pathlib import Path

from torchtune_kd.errors import UserError, nearest
from torchtune_kd.evaluation.tasks.cities import cities
from torchtune_kd.evaluation.tasks.items import Item, read_items
from torchtune_kd.evaluation.tasks.mmlu_dev import mmlu_dev

HELDOUT = "heldout"
LM_EVAL = "lm_eval:"
BUILT_IN: dict[str, Callable[[], list[Item]]] = {"cities": cities, "mmlu_dev": mmlu_dev}


def check_task(name: str) -> None:
    """Refuse a name that is no task: built in, a file of questions, or one of lm-eval's behind ``lm_eval:``."""
    if name in BUILT_IN or name == HELDOUT or name.startswith(LM_EVAL):
        return
    if name.endswith(".jsonl"):
        if not Path(name).is_file():
            raise UserError(f"The task {name} is no file: correct the path under `tasks`.")
        return
    known = [HELDOUT, *BUILT_IN]
    raise UserError(
        f"Unknown task {name!r} under `tasks`: {nearest(name, known)} Expected {', '.join(known)}, a file that ends in "
        f".jsonl, or a task of lm-eval such as `{LM_EVAL}hellaswag`."
    )


def items_of(name: str) -> list[Item]:
    """Return the questions of a task that is built in or a file."""
    return BUILT_IN[name]() if name in BUILT_IN else read_items(Path(name))
