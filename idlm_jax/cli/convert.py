"""``idlm convert``: any checkpoint into an Orbax checkpoint."""

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


def convert(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    target: Annotated[Positional[Path], arg(metavar="TARGET")],
    dtype: Literal["keep", "bfloat16", "float32"] = "keep",
    mask_token: str | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> int:
    """Turn a Hugging Face directory, a Hub model, a GGUF file or another Orbax checkpoint into an Orbax checkpoint.

    Tensors are streamed: memory stays under three times the largest one and half a gigabyte, whatever the size of the
    model. The target appears only when it is complete.

    Examples:
      idlm convert Qwen/Qwen3-0.6B checkpoints/qwen3-0.6b
      idlm convert smollm2.gguf checkpoints/smollm2 --dtype bfloat16 --mask-token 16

    Args:
        source: Directory, .gguf file, or Hugging Face Hub id (organisation/name).
        target: Directory to create.
        dtype: Of every tensor written; 'keep' leaves each as it is (quantised GGUF tensors become float32).
        mask_token: Text or id of the token whose rows draft; written into config.json as mask_token_id.
        overwrite: Replace a checkpoint that already stands at TARGET.
        verify: Compare the logits of the result with those of transformers (needs PyTorch); exit code 1 if they differ.
    """
    from idlm_jax.checkpoint.open import open_source
    from idlm_jax.checkpoint.source import find_mask_token, parse_dtype, stored_size
    from idlm_jax.checkpoint.store import write_orbax
    from idlm_jax.checkpoint.verify import compare_with_transformers, require_torch
    from idlm_jax.cli.progress import Progress

    start = time.monotonic()
    opened = open_source(source)
    if verify:
        require_torch(opened)
    cast = parse_dtype(dtype)
    mask_token_id = None if mask_token is None else find_mask_token(opened, mask_token)
    size = stored_size(opened, cast)
    with Progress("converting", size) as progress:
        write_orbax(opened, target, cast, mask_token_id, overwrite, progress)
    print(f"wrote {target} ({size / 1e9:.2f} GB in {time.monotonic() - start:.1f} s)")
    if not verify:
        return 0
    result = compare_with_transformers(open_source(target), opened, cast)
    print(result)
    if result.agrees:
        return 0
    print("idlm: error: the logits differ from those of transformers", file=sys.stderr)
    return 1
