"""What the command lines of this package share: a mistake ends in one sentence on stderr and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the process with the sentence of a ValueError, ImportError or OSError that the block raises.

    Raises:
        SystemExit: With :data:`EXIT_CODE`.
    """
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        said = _sentence_of(error) if isinstance(error, OSError) else " ".join(str(error).split())
        said = said.replace("pass overwrite=True", "pass --overwrite")  # a keyword there is an option here
        print(f"error: {said}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from error


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, without its full stop, to be quoted in a sentence."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__).rstrip(".")


def _sentence_of(error: OSError) -> str:
    what = f"{error.filename} cannot be read or written" if error.filename else "a file cannot be read or written"
    reason = error.strerror or first_line(error)
    return f"Expected files that can be read and written, but {what} ({reason}); check the path and its disk."
