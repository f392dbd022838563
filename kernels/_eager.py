"""Keeps ``torch.compile`` out of functions that do their own fusing."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def runs_eagerly(function: Callable[P, R]) -> Callable[P, R]:
    """Make a compiled caller break its graph around `function` instead of tracing into it.

    ``torch.compiler.disable`` as a decorator would do the same and import the compiler, a second or more, for
    everyone; here only a program that compiles pays for it.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper
