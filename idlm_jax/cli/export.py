"""``idlm export``: any checkpoint into a Hugging Face directory."""

import time
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


def export(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    target: Annotated[Positional[Path], arg(metavar="TARGET")],
    dtype: Literal["keep", "bfloat16", "float32"] = "keep",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Turn an Orbax checkpoint, a GGUF file or another Hugging Face directory into a directory that transformers loads.

    Writes safetensors (sharded, with an index, when large), configuration, tokenizer files and a model card.

    Examples:
      idlm export checkpoints/qwen3-0.6b qwen3-0.6b-hf --max-shard-size 2GB

    Args:
        source: Directory, .gguf file, or Hugging Face Hub id (organisation/name).
        target: Directory to create.
        dtype: Of every tensor written; 'keep' leaves each as it is (quantised GGUF tensors become float32).
        max_shard_size: Largest size of one safetensors file, as in 5GB or 500MB.
        overwrite: Replace a checkpoint that already stands at TARGET.
    """
    from idlm_jax.checkpoint.hf import write_hf
    from idlm_jax.checkpoint.open import open_source
    from idlm_jax.checkpoint.source import parse_dtype, stored_size
    from idlm_jax.cli.progress import Progress

    start = time.monotonic()
    opened = open_source(source)
    cast = parse_dtype(dtype)
    size = stored_size(opened, cast)
    with Progress("exporting", size) as progress:
        write_hf(opened, target, cast, max_shard_size, overwrite, progress)
    print(f"wrote {target} ({size / 1e9:.2f} GB in {time.monotonic() - start:.1f} s)")
