"""The versions that torchtune-kd works with, checked before torchtune is imported.

torchtune does not declare that it needs torch and torchao, and fails deep inside its own import when torchao
is too new. Our packages that import torchtune have it checked first, so that one sentence says why.
"""

import platform
import re
from importlib.metadata import PackageNotFoundError, version

import torchtune_kd

TORCHTUNE_VERSION = "0.6.1"
TORCHAO_FROM = (0, 10)
TORCHAO_BELOW = (
    0,
    16,
)  # 0.16 drops int4_weight_only and 0.18 torchao.dtypes.nf4tensor, which torchtune imports

TORCHTUNE_PIN = f"torchtune=={TORCHTUNE_VERSION}"
TORCHAO_PIN = "torchao>={}.{},<{}.{}".format(*TORCHAO_FROM, *TORCHAO_BELOW)


def check_versions() -> None:
    """Check, from the installed metadata alone, that torchtune and torchao are those that work together.

    Raises:
        ImportError: if torchtune is missing or is not 0.6.1, or if torchao is missing or outside the window
            that torchtune 0.6.1 works with. The message is one sentence with the command that mends it.
    """
    torchtune = _installed("torchtune")
    # a local version such as 0.6.1+cpu is the same release
    if torchtune is None or torchtune.partition("+")[0] != TORCHTUNE_VERSION:
        raise ImportError(_sentence("torchtune-kd", "torchtune", torchtune, TORCHTUNE_PIN))
    torchao = _installed("torchao")
    if torchao is None or not TORCHAO_FROM <= _release(torchao) < TORCHAO_BELOW:
        raise ImportError(_sentence(f"torchtune {torchtune}", "torchao", torchao, TORCHAO_PIN))


def installed_versions() -> dict[str, str]:
    """Return the versions of Python, of torchtune-kd and of what it is built on, where they are installed."""
    found = {name: _installed(name) for name in ("torch", "torchtune", "torchao", "torchdata")}
    return {
        "torchtune_kd": torchtune_kd.__version__,
        "python": platform.python_version(),
        **{name: text for name, text in found.items() if text is not None},
    }


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _release(text: str) -> tuple[int, int]:
    """Return the first two numbers of a version; `0.16.0.dev2025` counts as 0.16, whose removals it already has."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def _sentence(who: str, package: str, found: str | None, pin: str) -> str:
    state = f"{package} {found} is installed" if found else f"{package} is not installed"
    return f'{who} needs {pin}, but {state}: run pip install "{pin}".'
