"""Adapters that come with the package, by name: PEFT directories in ``idlm_jax/adapters``, each with its card."""

from pathlib import Path

from idlm_jax.errors import UserError, did_you_mean

ADAPTERS = Path(__file__).parents[1] / "adapters"
# Name -> directory. ``smollm2-n4`` drafts for SmolLM2-135M-Instruct at strides up to 4.
SHIPPED = {"smollm2-n4": "smollm2_n4"}


def is_installed(name: str) -> bool:
    """Whether this installation has the weights of the shipped adapter ``name``."""
    return (ADAPTERS / SHIPPED[name] / "adapter_model.safetensors").is_file()


def shipped_directory(name: str) -> Path | None:
    """Where the adapter of this name lies, or None for a name that no shipped adapter has.

    Raises UserError for a name that was nearly one, and for an adapter that this installation lacks.
    """
    if name in SHIPPED:
        if not is_installed(name):
            raise UserError(f"{name}: this installation of idlm_jax came without the adapter; install it anew")
        return ADAPTERS / SHIPPED[name]
    hint = did_you_mean(name, SHIPPED)
    if hint and "/" not in name:
        raise UserError(f"{name}: no such directory, and no such adapter in this package{hint}")
    return None
