"""Does a converted checkpoint compute what transformers computes? Needs PyTorch; nothing else here does."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.checkpoint.companions import without_torch_advice
from idlm_jax.checkpoint.open import load_params
from idlm_jax.checkpoint.source import WeightSource
from idlm_jax.errors import UserError

TEXT = (
    "The quick brown fox jumps over the lazy dog. Water boils at 100 degrees at sea level; 17 * 23 = 391.\n"
    "def square(x):\n    return x * x\n"
)
# Largest difference of two logits allowed, as a share of the largest logit: float32 sums in another order.
TOLERANCE = 2e-4


@dataclass(frozen=True)
class LogitComparison:
    """Logits of one prompt, ours against transformers', in float32."""

    tokens: int
    max_error: float
    # Largest absolute logit.
    scale: float
    # Share of positions at which both prefer the same token.
    agreement: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is rounding."""
        return self.max_error <= TOLERANCE * self.scale

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens against transformers: max abs error {self.max_error:.2e}, "
            f"{self.max_error / self.scale:.1e} of the logit scale {self.scale:.1f} (allowed {TOLERANCE:.0e}); "
            f"same argmax at {self.agreement:.1%}"
        )


def require_torch(source: WeightSource) -> None:
    """Raise UserError unless ``source`` can be loaded by transformers here."""
    if source.kind == "orbax":
        raise UserError(f"{source.path}: transformers reads Hugging Face directories and GGUF files only")
    for package in ("torch", "accelerate") if source.kind == "gguf" else ("torch",):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"comparing with transformers needs {package}, which is not installed (pip install {package})"
            )


def compare_with_transformers(
    checkpoint: WeightSource, original: WeightSource, dtype: np.dtype | None = None
) -> LogitComparison:
    """Logits of ``checkpoint`` against those that transformers computes from ``original``, both in float32.

    ``dtype`` is what the conversion cast the weights to: the original's are rounded alike.
    """
    require_torch(original)
    import torch  # pyrefly: ignore[missing-import]

    tokens = _prompt(checkpoint)
    reference = _reference_model(original)
    if dtype is not None:
        for parameter in reference.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype.name)).float()
    with torch.no_grad():
        wanted = reference(torch.tensor([tokens])).logits[0].numpy()
    del reference
    model = Qwen3(checkpoint.config, load_params(checkpoint, jnp.dtype(jnp.float32)))
    ours = np.asarray(causal_logits(model, jnp.array([tokens]))[0])
    return LogitComparison(
        tokens=len(tokens),
        max_error=float(np.abs(ours - wanted).max()),
        scale=float(np.abs(wanted).max()),
        agreement=float((ours.argmax(-1) == wanted.argmax(-1)).mean()),
    )


def _prompt(source: WeightSource) -> list[int]:
    try:
        return list(source.tokenizer()(TEXT, add_special_tokens=False)["input_ids"])
    except UserError:  # no tokenizer: any tokens will do
        return np.random.default_rng(0).integers(0, source.config.vocab_size, 48).tolist()


def _reference_model(source: WeightSource) -> Any:
    with without_torch_advice():
        import transformers
    # sdar: the same tensors under a name that transformers does not know
    family = "qwen3" if source.config.family == "sdar" else source.config.family
    settings = {key: value for key, value in source.hf_config.items() if key not in ("model_type", "auto_map")}
    options: dict[str, Any] = {
        "config": transformers.AutoConfig.for_model(family, **settings),
        "dtype": "float32",
        "attn_implementation": "eager",
    }
    directory = source.path
    if source.kind == "gguf":
        directory, options["gguf_file"] = source.path.parent, source.path.name
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise UserError(f"{source.path}: transformers cannot load it: {' '.join(str(error).split())[:300]}") from None
