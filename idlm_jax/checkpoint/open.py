"""Open whatever a path or a Hugging Face Hub id stands for, and load its parameters."""

import difflib
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from idlm_jax.backbone.weights import Params, Weight, build_params, weight_table
from idlm_jax.checkpoint.arrays import to_device, to_devices
from idlm_jax.checkpoint.source import WeightSource, read_each, read_parts
from idlm_jax.errors import UserError

# What a download from the Hub brings: weights, configuration, tokenizer; no code, no PyTorch files.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_source(path_or_hub_id: str | Path) -> WeightSource:
    """Open a Hugging Face directory, a GGUF file, an Orbax checkpoint of ours, or a model of the Hugging Face Hub."""
    path = Path(path_or_hub_id).expanduser()
    if not path.exists():
        path = download_from_hub(str(path_or_hub_id), path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{path}: give the directory of a checkpoint or a .gguf file")
        return _open_gguf(path)
    if (path / "idlm.json").is_file():
        from idlm_jax.checkpoint.store import OrbaxSource

        return OrbaxSource(path)
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not any(path.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise UserError(f"{path}: holds {len(ggufs)} GGUF files; name one, for example {ggufs[0]}")
        return _open_gguf(ggufs[0])
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no checkpoint here (no idlm.json, no config.json, no .gguf file)")
    from idlm_jax.checkpoint.hf import HFSource

    return HFSource(path)


def load_params(
    source: WeightSource,
    dtype: jnp.dtype | None = None,
    sharding: Callable[[Weight], jax.sharding.Sharding] | None = None,
) -> Params:
    """The (unstacked) parameters as JAX arrays, in ``dtype`` or as stored, one tensor at a time.

    Arrays go to the default device, or where ``sharding`` puts each weight; of a Hugging Face directory, each process
    then reads what its devices hold and no more.
    """
    leaves: dict[str, jax.Array] = {}
    # The bar appears on a terminal only, and only when loading takes more than two seconds.
    weights = weight_table(source.config)
    with tqdm(total=len(weights), desc="loading", unit="tensor", delay=2, disable=None) as progress:
        if sharding is None:
            for weight, array in zip(weights, read_each(source, weights), strict=True):
                leaves[weight.path] = to_device(array, dtype)
                progress.update()
        else:
            for weight, read in zip(weights, read_parts(source, weights), strict=True):
                leaves[weight.path] = to_devices(read, weight.shape, dtype, sharding(weight))
                progress.update()
    return build_params(source.config, lambda weight: leaves[weight.path])


def _open_gguf(path: Path) -> WeightSource:
    from idlm_jax.checkpoint.gguf import GGUFSource

    return GGUFSource(path)


def download_from_hub(name: str, path: Path) -> Path:
    """The local copy of a Hub model; raises UserError that says why ``name`` is neither a path nor such a model."""
    if not _HUB_ID.fullmatch(name) or name.lower().endswith((".gguf", ".safetensors", ".json")):
        raise UserError(f"{name}: no such file or directory{_similar_path(path)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS)))
    except GatedRepoError:
        raise UserError(f"{name}: the model is gated; accept its terms on the Hub and log in (hf auth login)") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such directory, and no such model on the Hugging Face Hub{_similar_path(path)}"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{name}: no such directory, and the Hugging Face Hub cannot be reached "
            f"({type(error).__name__}){_similar_path(path)}"
        ) from None


def _similar_path(path: Path) -> str:
    """``"; did you mean …?"`` for a sibling of nearly the same name."""
    if not path.parent.is_dir():
        return ""
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean '{path.parent / close[0]}'?" if close else ""
