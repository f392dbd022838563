"""Triton's interpreter at less than half its time, for tests: what it does, it does not do again and again."""

import functools
import importlib.util

import numpy as np


def _let_minima_leave_out_nan(builder: type) -> None:
    """Return the number of a number and NaN, as the compiled minimum does and interpreters before Triton 3.7 do not."""
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)


class _Nothing:
    def restore(self) -> None:
        """Nothing was replaced."""


@functools.cache
def patch_language_once_a_launch() -> None:
    """Let a launch look through Triton's language once for what the interpreter replaces there.

    As it is, it looks again at every call of a device function, for which most of the time goes. What a call replaces
    depends on the modules that its function sees, so that one look for each of these modules does the same.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    _let_minima_leave_out_nan(interpreter.InterpreterBuilder)
    patch_lang, launch = getattr(interpreter, "_patch_lang", None), interpreter.GridExecutor.__call__
    if patch_lang is None:
        return  # a Triton that does it otherwise
    done: set[int] = set()

    def once(function):
        module = id(function.__globals__)
        if module in done:
            return _Nothing()
        done.add(module)
        return patch_lang(function)

    def launched(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched
