"""How often drafts would be accepted: introspective acceptance by depth, and the tokens a forward that follow from it.

Measured on given text by one two-stream pass: p is the clean row's distribution, q the mask row's for the same token
(method.md 6.1, 6.2). Σ min(p, q) is the probability that a sampled draft is accepted, whichever exact coupling is used.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from idlm_jax.backbone.adapter import Adapter
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.checkpoint.peft import load_adapter
from idlm_jax.checkpoint.source import WeightSource, find_mask_token
from idlm_jax.data.pipeline import held_out_split, make_dataset
from idlm_jax.data.tokens import TokenStore, check_tokenizer
from idlm_jax.decoding.config import MAX_STRIDE
from idlm_jax.decoding.window import LAYOUTS
from idlm_jax.errors import UserError, did_you_mean
from idlm_jax.training.config import DTYPES
from idlm_jax.training.groups import Batch, GroupPolicy, draw_groups
from idlm_jax.training.params import Flat, ModelBuilder, flat_adapter, flat_base
from idlm_jax.training.two_stream import two_streams
from pallas_kernels.linear_cross_entropy.api import map_rows
from pallas_kernels.linear_cross_entropy.reference import cross_entropy


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Sums over rows, kept on the device; temperatures as given, greedy (agreement of the two argmaxes) last."""

    # Acceptance of rows at each depth, the product over a group's first k rows, and the numbers of rows and groups.
    accepted: Float[Array, "T block"]
    prefix: Float[Array, "T block"]
    rows: Float[Array, " block"]
    groups: Float[Array, " block"]
    # −log p of the learnt tokens, in nats, and their number.
    clean_loss: Float[Array, ""]
    clean_rows: Float[Array, ""]


@dataclass(frozen=True)
class Acceptance:
    """Acceptance at one temperature (0: greedy)."""

    temperature: float
    # α_k: the mean chance that the draft at depth k is accepted, given that those before it were.
    by_depth: tuple[float, ...]
    # P_k: the chance that the first k drafts are all accepted.
    prefix: tuple[float, ...]

    def tokens_per_forward(self, stride: int, layout: str) -> float:
        """TPF of a stride up to block_size + 1 that follows from P_k."""
        return LAYOUTS[layout].tokens_per_forward(self.prefix[: stride - 1])


@dataclass(frozen=True)
class AcceptanceReport:
    """What ``idlm eval acceptance`` measures."""

    temperatures: tuple[Acceptance, ...]
    # Mean −log p of the learnt tokens on the clean stream, in nats, and its exponential.
    clean_loss: float
    perplexity: float
    rows: int
    tokens: int


def measure(
    builder: ModelBuilder,
    params: Flat,
    batches: Iterable[Batch],
    block_size: int,
    *,
    gated: bool = True,
    temperatures: Sequence[float] = (1.0,),
    seed: int = 0,
    attention: str = "auto",
) -> AcceptanceReport:
    """Acceptance over all batches, one group of masks for every ``block_size`` tokens, at random starts.

    Greedy is always measured too (temperature 0). ``gated``: an adapter acts on mask rows only, as in lossless
    decoding. Raises UserError where there is nothing to draft.
    """
    step = _compiled(builder, GroupPolicy(block_size, "random"), gated, tuple(temperatures), attention)
    total: Sums | None = None
    key = jax.random.key(seed)
    for i, batch in enumerate(batches):
        sums = step(params, batch, jax.random.fold_in(key, i))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None or not float(total.rows[0]):
        raise UserError("nothing to measure acceptance on: no learnt token of the data is followed by another")
    return _report(jax.device_get(total), (*temperatures, 0.0))


def evaluate_store(
    model: str,
    data: str,
    *,
    adapter: str | None = None,
    gated: bool = True,
    mask_token: str | None = None,
    base: str | None = None,
    block_size: int = 3,
    temperatures: Sequence[float] = (1.0,),
    documents: int = 256,
    length: int = 1024,
    batch_size: int = 8,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> tuple[AcceptanceReport, AcceptanceReport | None]:
    """``measure`` on documents of a token store (0: all of them), and the same for a ``base`` model.

    Raises UserError for whatever does not fit together.
    """
    _check_settings(block_size, temperatures, documents, batch_size, dtype, seed)
    source = open_source(model)
    loaded = load_adapter(adapter, source.config) if adapter else None
    mask_token_id = source.config.mask_token_id
    if mask_token is not None:
        mask_token_id = find_mask_token(source, mask_token)
    elif loaded and loaded.config.mask_token_id is not None:
        mask_token_id = loaded.config.mask_token_id
    if mask_token_id is None:
        raise UserError(f"{model} names no mask token to draft with: give --mask-token TEXT_OR_ID")
    base_source = open_source(base) if base else None
    store = TokenStore.open(data)
    for each in (source, base_source):
        if each is None:
            continue
        context = each.config.max_position_embeddings
        if length > context:
            raise UserError(f"length {length} exceeds the context of {context} of {each.path}: give a smaller --length")
        check_tokenizer(store.metadata, each.tokenizer(), data)
    chosen = held_out_split(store, documents, seed)[1] if 0 < documents < len(store) else store

    def batches() -> Iterable[Batch]:
        dataset = make_dataset(chosen, length=length, batch_size=batch_size, seed=seed, shuffle=False, epochs=1)
        return (Batch.from_dict(jax.tree.map(jnp.asarray, arrays)) for arrays in dataset)

    def report(source: WeightSource, loaded: Adapter | None) -> AcceptanceReport:
        config = source.config.replace(mask_token_id=mask_token_id)
        builder = ModelBuilder(config, loaded.config if loaded else None, dtype)
        params = flat_base(load_params(source, jnp.dtype(dtype)))
        if loaded:
            params |= flat_adapter(loaded.params)
        return measure(builder, params, batches(), block_size, gated=gated, temperatures=temperatures, seed=seed)

    return report(source, loaded), report(base_source, None) if base_source else None


def _check_settings(
    block_size: int, temperatures: Sequence[float], documents: int, batch_size: int, dtype: str, seed: int
) -> None:
    if not 1 <= block_size < MAX_STRIDE:
        raise UserError(f"block_size must be in 1 … {MAX_STRIDE - 1}, not {block_size}")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    if documents < 0:
        raise UserError(f"documents must be 0 (all of them) or more, not {documents}")
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}' (one of {', '.join(DTYPES)}){did_you_mean(dtype, DTYPES)}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be in [0, 2^32), not {seed}")
    for temperature in temperatures:
        if not (math.isfinite(temperature) and temperature > 0):
            raise UserError(f"temperature must be positive (greedy is always measured), not {temperature}")


@lru_cache(maxsize=8)
def _compiled(
    builder: ModelBuilder,
    policy: GroupPolicy,
    gated: bool,
    temperatures: tuple[float, ...],
    attention: str,
) -> jax.stages.Wrapped:
    """One compiled program for all measurements of a run."""
    return jax.jit(
        partial(
            _batch_sums,
            builder=builder,
            policy=policy,
            gated=gated,
            temperatures=temperatures,
            attention=attention,
        )
    )


def _batch_sums(
    params: Flat,
    batch: Batch,
    key: Array,
    *,
    builder: ModelBuilder,
    policy: GroupPolicy,
    gated: bool,
    temperatures: tuple[float, ...],
    attention: str,
) -> Sums:
    model, mask_token_id = builder.build(params), builder.config.mask_token_id
    assert mask_token_id is not None
    has_adapter = builder.adapter is not None
    rows = draw_groups(batch, policy, mask_token_id, key)
    clean_from, noisy_from = 0 if has_adapter and not gated else None, 0 if has_adapter else None
    clean_hidden, noisy_hidden = two_streams(model, batch, rows, policy.block_size, clean_from, noisy_from, attention)
    teacher = jnp.take_along_axis(clean_hidden, rows.clean_row[:, :, None], axis=1)

    def compare(logits: Array, teacher: Array, target: Int[Array, "B R"]) -> list[Float[Array, "B R"]]:
        # The decoder never emits the mask token, so neither distribution has it.
        no_mask = jnp.where(jnp.arange(logits.shape[-1]) == mask_token_id, -jnp.inf, 0.0)
        q, p = logits + no_mask, teacher + no_mask
        accepted = [jnp.sum(jnp.minimum(jax.nn.softmax(p / t), jax.nn.softmax(q / t)), axis=-1) for t in temperatures]
        return [*accepted, (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(jnp.float32)]

    head = builder.head(params)
    accepted_TBR = jnp.stack(map_rows(compare, noisy_hidden, head, rows.targets, teacher))
    groups = (accepted_TBR.shape[0], *rows.targets.shape[:1], -1, policy.block_size)
    accepted, is_target = accepted_TBR.reshape(groups), rows.is_target.reshape(groups[1:]).astype(jnp.float32)
    whole = jnp.cumprod(is_target, axis=-1)
    clean = map_rows(cross_entropy, clean_hidden, head, batch.next_tokens)
    clean_targets = batch.clean_targets.astype(jnp.float32)
    return Sums(
        accepted=jnp.sum(accepted * is_target, axis=(1, 2)),
        prefix=jnp.sum(jnp.cumprod(accepted, axis=-1) * whole, axis=(1, 2)),
        rows=jnp.sum(is_target, axis=(0, 1)),
        groups=jnp.sum(whole, axis=(0, 1)),
        clean_loss=jnp.sum(clean * clean_targets),
        clean_rows=jnp.sum(clean_targets),
    )


def _report(sums: Sums, temperatures: tuple[float, ...]) -> AcceptanceReport:
    by_depth = np.asarray(sums.accepted) / np.maximum(np.asarray(sums.rows), 1)
    prefix = np.asarray(sums.prefix) / np.maximum(np.asarray(sums.groups), 1)
    clean_loss = float(sums.clean_loss) / max(float(sums.clean_rows), 1)
    return AcceptanceReport(
        temperatures=tuple(
            Acceptance(temperature, tuple(map(float, by_depth[i])), tuple(map(float, prefix[i])))
            for i, temperature in enumerate(temperatures)
        ),
        clean_loss=clean_loss,
        perplexity=float(np.exp(clean_loss)),
        rows=int(np.sum(sums.rows)),
        tokens=int(sums.clean_rows),
    )
