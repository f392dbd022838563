"""Mistakes of the user: one sentence, no traceback."""

import functools
import sys
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """A mistake in the config, the files or the launch. The message is one sentence: what, where, what to do."""


def one_sentence(recipe_main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a recipe's main function: a :class:`UserError` ends the process with its sentence and exit code 2."""

    @functools.wraps(recipe_main)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return recipe_main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapper
