"""Verification on NVIDIA GPUs: the filters' thresholds and the draws by Triton kernels, the rest as in the reference.

The noise is generated inside the kernel, bit for bit that of ``jax.random``, so no array of noise is stored and tokens
differ from the reference's only where two scores tie within float32 rounding; thresholds differ only where a mass is
within rounding of top-p, as sums run in another order. Logits are read where they are: rows are named, not gathered.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import jax_triton
from jaxtyping import Array, Float, Int, Key

from pallas_kernels.verify import reference, triton_kernels
from pallas_kernels.verify.reference import LOWEST, PURPOSE_DRAFT, PURPOSE_TOKEN, Coupling, Drafts, Filters

# With no more rows than this, a row gets a larger program, or several.
_FEW_ROWS = 128
# Warps of a program that summarizes, for few rows and for many, and the values that a warp reads at once.
_WARPS = (8, 4)
_WARP_LANES = 256
# Candidates that such a program has room for, by lanes, and the values of a lane that share one maximum in memory.
_ROOM = 8
_GROUP = 16
# Warps of a program that draws, and the values that it reads at once.
_DRAW_WARPS = 4
_TILE = 512
# Reads under way of a program that summarizes, which few others share a multiprocessor with, and of one that draws.
_STAGES, _DRAW_STAGES = 5, 3
# A value must be the same wherever it is computed again: with multiplications fused into the subtraction of the
# largest value, that value less itself would not be 0.
_COMMON = {"enable_fp_fusion": False}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Summary:
    """What the filters make of every row, enough to give the log-probability of any token."""

    # Lowest kept value of the tempered logits, as ``reference.ordered``.
    threshold: Int[Array, "B R"]
    # Largest value, its token, and log of the sum of the kept ``exp(value - largest)``; undefined unless asked for.
    maximum: Float[Array, "B R"]
    best: Int[Array, "B R"]
    log_total: Float[Array, "B R"]
    # The token drawn from a filtered row, if a key was given; -1 where ``draw`` has to.
    token: Int[Array, "B R"]


def _flat(row_BR: Int[Array, "B R"], window: int) -> Int[Array, " B*R"]:
    """Rows of every request as rows of all requests' windows, one after the other."""
    return (row_BR + window * jnp.arange(len(row_BR), dtype=jnp.int32)[:, None]).reshape(-1).astype(jnp.int32)


def _per_row(values_B: Array, row_BR: Int[Array, "B R"], dtype: type) -> Array:
    return jnp.broadcast_to(values_B.astype(dtype)[:, None], row_BR.shape).reshape(-1)


def summarize(
    logits_BWV: Float[Array, "B W V"],
    row_BR: Int[Array, "B R"],
    filters: Filters,
    removed: int | None,
    normalise: bool,
    key_BR: Key[Array, "B R"] | None = None,
) -> Summary:
    """Filter the given rows, and with a key draw from most filtered ones.

    Without ``normalise`` only the threshold is found, and unfiltered rows are not read.
    """
    rows, vocabulary = row_BR.size, logits_BWV.shape[-1]
    warps = _WARPS[rows > _FEW_ROWS]
    lanes = _WARP_LANES * warps
    room = _ROOM * lanes
    groups = lanes * -(-vocabulary // (_GROUP * lanes))
    shapes = [jax.ShapeDtypeStruct(row_BR.shape, dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
    shapes += [jax.ShapeDtypeStruct(row_BR.shape, jnp.int32)] * 2
    shapes += [jax.ShapeDtypeStruct((rows, room + groups), dtype) for dtype in (jnp.float32, jnp.int32)]
    threshold, maximum, log_total, best, token, _, _ = jax_triton.triton_call(
        logits_BWV,
        _flat(row_BR, logits_BWV.shape[1]),
        _per_row(filters.temperature == 0, row_BR, jnp.int32),
        _per_row(reference.sharpness(filters), row_BR, jnp.float32),
        _per_row(filters.top_k, row_BR, jnp.int32),
        _per_row(filters.top_p, row_BR, jnp.float32),
        jnp.zeros((1, 2), jnp.uint32) if key_BR is None else jax.random.key_data(key_BR).reshape(-1, 2),
        kernel=triton_kernels.summarize_rows,
        out_shape=shapes,
        grid=(rows,),
        num_warps=warps,
        V=vocabulary,
        ROOM=room,
        LANES=lanes,
        GROUP=_GROUP,
        GROUPS=groups,
        REMOVED=-1 if removed is None else removed,
        NORMALISE=normalise,
        DRAW=key_BR is not None,
        STAGES=_STAGES,
        **_COMMON,
    )
    return Summary(threshold, maximum, best, log_total, token)


def draw(
    logits_BWV: Float[Array, "B W V"],
    row_BR: Int[Array, "B R"],
    filters: Filters,
    threshold_BR: Int[Array, "B R"],
    drawn_BR: Int[Array, "B R"],
    key_BR: Key[Array, "B R"],
    removed: int | None = None,
) -> Int[Array, "B R"]:
    """One token of each of the given rows: argmax of tempered logit plus noise, over what the threshold keeps.

    Tokens already drawn are passed on; -1 stands for the others.
    """
    rows, vocabulary = row_BR.size, logits_BWV.shape[-1]
    tiles = -(-vocabulary // _TILE)
    part = _TILE * -(-tiles // max(1, 8 * _FEW_ROWS // rows))
    parts = -(-vocabulary // part)
    score, token = jax_triton.triton_call(
        logits_BWV,
        _flat(row_BR, logits_BWV.shape[1]),
        _per_row(filters.temperature == 0, row_BR, jnp.int32),
        _per_row(reference.sharpness(filters), row_BR, jnp.float32),
        threshold_BR.reshape(-1),
        drawn_BR.reshape(-1),
        jax.random.key_data(key_BR).reshape(-1, 2),
        kernel=triton_kernels.draw_rows,
        out_shape=[jax.ShapeDtypeStruct((rows, parts), dtype) for dtype in (jnp.float32, jnp.int32)],
        grid=(rows, parts),
        num_warps=_DRAW_WARPS,
        V=vocabulary,
        PART=part,
        TILE=_TILE,
        REMOVED=-1 if removed is None else removed,
        STAGES=_DRAW_STAGES,
        **_COMMON,
    )
    winner = jnp.argmax(score, axis=1, keepdims=True)  # the first of equals: the lowest token
    return jnp.take_along_axis(token, winner, axis=1).reshape(row_BR.shape)


def _log_probs(
    logits_BRT: Float[Array, "B R T"], token_BRT: Int[Array, "*#B #R T"], summary: Summary, filters: Filters
) -> Float[Array, "B R T"]:
    """Filtered log-probabilities of some tokens of summarized rows, given their logits."""
    greedy = (filters.temperature == 0)[:, None, None]
    scaled = logits_BRT * reference.sharpness(filters)[:, None, None]
    log_p = (scaled - summary.maximum[:, :, None]) - summary.log_total[:, :, None]
    kept = reference.ordered(scaled) >= summary.threshold[:, :, None]
    kept = jnp.where(greedy, token_BRT == summary.best[:, :, None], kept)
    return jnp.where(kept, jnp.where(greedy, 0.0, log_p), -jnp.inf)


def _log_prob_rows(
    logits_BWV: Float[Array, "B W V"],
    row_BR: Int[Array, "B R"],
    summary: Summary,
    filters: Filters,
    removed: int | None,
) -> Float[Array, "B R V"]:
    logits = jnp.take_along_axis(logits_BWV, row_BR[:, :, None], axis=1)
    token = jnp.arange(logits.shape[-1])
    log_p = _log_probs(logits, token, summary, filters)
    return log_p if removed is None else jnp.where(token == removed, -jnp.inf, log_p)


def verify(
    logits_BWV: Float[Array, "B W V"],
    filters: Filters,
    coupling: Coupling,
    drafts: Drafts,
    warm_B: Array,
    position_BN: Int[Array, "B N"],
    removed: int | None,
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """As ``api.verify``, for the two couplings of the reference."""
    row_BN = jnp.broadcast_to(jnp.arange(position_BN.shape[1], dtype=jnp.int32), position_BN.shape)
    if not coupling.stores_q:
        key_BN = reference.row_keys(filters.key, position_BN, PURPOSE_TOKEN)
        summary = summarize(logits_BWV, row_BN, filters, removed, normalise=False, key_BR=key_BN)
        tokens = draw(logits_BWV, row_BN, filters, summary.threshold, summary.token, key_BN, removed)
        return reference.agreeing(tokens, drafts, warm_B)
    summary = summarize(logits_BWV, row_BN, filters, removed, normalise=True)
    drafted = drafts.tokens[:, :, None]
    of_drafts = jax.tree.map(lambda values_BN: values_BN[:, :-1], summary)
    chosen = jnp.take_along_axis(logits_BWV[:, : drafted.shape[1]], drafted, axis=2)
    log_p = _log_probs(chosen, drafted, of_drafts, filters)[:, :, 0]
    accepted = reference.accepted_by_ratio(log_p, drafts, warm_B, filters.key, position_BN)
    row_B1 = accepted[:, None]
    at_row = jax.tree.map(lambda values_BN: jnp.take_along_axis(values_BN, row_B1, axis=1), summary)
    log_p_row = _log_prob_rows(logits_BWV, row_B1, at_row, filters, removed)
    log_p_row = reference.corrected(log_p_row, drafts, accepted, warm_B)
    key_B1 = reference.row_keys(filters.key, jnp.take_along_axis(position_BN, row_B1, axis=1), PURPOSE_TOKEN)
    # Filtered and tempered already; the one row of its array.
    as_it_is = replace(filters, temperature=jnp.ones_like(filters.temperature))
    everything, nothing = jnp.full_like(row_B1, LOWEST), jnp.full_like(row_B1, -1)
    return accepted, draw(log_p_row, jnp.zeros_like(row_B1), as_it_is, everything, nothing, key_B1)[:, 0]


def draft(
    logits_BWV: Float[Array, "B W V"],
    row_Bd: Int[Array, "B drafts"],
    filters: Filters,
    coupling: Coupling,
    position_Bd: Int[Array, "B drafts"],
    removed: int | None,
) -> Drafts:
    """As ``api.draft``, for the two couplings of the reference."""
    purpose = PURPOSE_DRAFT if coupling.stores_q else PURPOSE_TOKEN
    key_Bd = reference.row_keys(filters.key, position_Bd, purpose)
    summary = summarize(logits_BWV, row_Bd, filters, removed, normalise=coupling.stores_q, key_BR=key_Bd)
    tokens = draw(logits_BWV, row_Bd, filters, summary.threshold, summary.token, key_Bd, removed)
    log_q = _log_prob_rows(logits_BWV, row_Bd, summary, filters, removed) if coupling.stores_q else None
    return Drafts(tokens, log_q)
