"""The two Triton kernels of verification; ``gpu.py`` calls them.

``summarize_rows`` finds what the filters keep of a row, by two reads of it; ``draw_rows`` draws from it, by one. Both
see a row as ``logits * sharpness`` in float32 and compare values as int32 of the same order, as the reference does.
Imports Triton, so it is imported only where that kernel is chosen.
"""

# Triton compiles these functions: their arguments are pointers and constants, not JAX arrays.
import triton
import triton.language as tl
from triton.language.extra import libdevice

# Lower than every float in the order of ``_order``; a row with this threshold is not filtered.
LOWEST = tl.constexpr(-(2**31))
# Finite, so that differences with the -inf of a removed token are no NaN.
FLOOR = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _order(values):
    """Float32 as int32 of the same order; both zeros are one value."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load(logits_ptr, index, inside, sharpness, REMOVED: tl.constexpr):
    """Tempered logits, -inf outside the row and for the removed token."""
    logits = tl.load(logits_ptr + index, mask=inside, other=float("-inf"))
    return tl.where(index == REMOVED, float("-inf"), logits) * sharpness


@triton.jit
def _weight(values_ptr, count, lowest, maximum, BY_MASS: tl.constexpr, LANES: tl.constexpr):
    """Mass (against the largest value) or number of the values from ``lowest`` on."""
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float32)
    start = tl.full((), 0, tl.int32)
    while start < count:
        values = tl.load(values_ptr + start + lane, mask=start + lane < count, other=FLOOR)
        weight = tl.exp(values - maximum) if BY_MASS else tl.full((LANES,), 1.0, tl.float32)
        total += tl.where((start + lane < count) & (_order(values) >= lowest), weight, 0.0)
        start += LANES
    return tl.sum(total, axis=0)


@triton.jit
def _search(values_ptr, count, low, maximum, target, BY_MASS: tl.constexpr, LANES: tl.constexpr):
    """The largest number, ``low`` at least, from which on the values weigh ``target``: bisects the float32 numbers."""
    high = _order(maximum)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # the upper average, without overflow
        enough = _weight(values_ptr, count, middle, maximum, BY_MASS, LANES) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _collect(
    logits_ptr, sharpness, lowest, candidates_ptr,
    V: tl.constexpr, LANES: tl.constexpr, REMOVED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store the row's tempered values from ``lowest`` on; their number."""
    tl.debug_barrier()  # whoever still reads the candidates of before
    lane = tl.arange(0, LANES)
    count = tl.full((), 0, tl.int32)
    for start in tl.range(0, V, LANES, num_stages=STAGES):
        values = _load(logits_ptr, start + lane, start + lane < V, sharpness, REMOVED)
        taken = ((_order(values) >= lowest) & (start + lane < V)).to(tl.int32)
        here = tl.sum(taken, axis=0)
        if here > 0:
            tl.store(candidates_ptr + count + tl.cumsum(taken, axis=0) - 1, values, mask=taken > 0)
            count += here
    tl.debug_barrier()
    return count


@triton.jit
def summarize_rows(
    logits_all_ptr, row_ptr, greedy_ptr, sharpness_ptr, top_k_ptr, top_p_ptr,
    threshold_ptr, maximum_ptr, log_total_ptr, best_ptr, scratch_ptr,
    V: tl.constexpr, ROOM: tl.constexpr, LANES: tl.constexpr, REMOVED: tl.constexpr, NORMALISE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program a row: threshold of top-k, then top-p; with NORMALISE the largest value, where it is, and log-sum.

    Value i of the row belongs to lane ``i % LANES``. The first read keeps every lane's maximum. The k-th largest of
    these is a lower bound of the row's k-th largest value, and rarely far below it: what reaches the bound are the
    candidates, which a second read collects and the thresholds are bisected among. Where they do not suffice (top-k
    above the number of lanes, top-p of a flat row) the whole row becomes candidates.
    """
    program = tl.program_id(0)
    greedy = tl.load(greedy_ptr + program) != 0
    sharpness = tl.load(sharpness_ptr + program)
    top_k = tl.load(top_k_ptr + program)
    top_p = tl.load(top_p_ptr + program)
    filtering = ((top_k > 0) | (top_p < 1)) & ~greedy
    tl.store(threshold_ptr + program, LOWEST)
    if NORMALISE or filtering:
        logits_ptr = logits_all_ptr + tl.load(row_ptr + program).to(tl.int64) * V
        candidates_ptr = scratch_ptr + program.to(tl.int64) * ROOM
        lane = tl.arange(0, LANES)
        maxima = tl.full((LANES,), FLOOR, tl.float32)
        totals = tl.zeros((LANES,), tl.float32)
        places = tl.zeros((LANES,), tl.int32)
        for start in tl.range(0, V, LANES, num_stages=STAGES):
            values = _load(logits_ptr, start + lane, start + lane < V, sharpness, REMOVED)
            higher = tl.maximum(maxima, values)
            totals = totals * tl.exp(maxima - higher) + tl.exp(values - higher)
            places = tl.where(values > maxima, start + lane, places)
            maxima = higher
        maximum = tl.max(maxima, axis=0)
        total = tl.sum(totals * tl.exp(maxima - maximum), axis=0)
        if filtering:
            # For top-p alone, the bound that 7/8 of the lanes reach: about 2 LANES candidates.
            rank = tl.where(top_k > 0, tl.minimum(top_k, LANES * 7 // 8), LANES * 7 // 8).to(tl.float32)
            tl.store(candidates_ptr + lane, maxima)
            tl.debug_barrier()
            lowest = tl.full((), LOWEST, tl.int32)
            lowest = _search(candidates_ptr, LANES, lowest, maximum, rank, False, LANES)
            count = _collect(logits_ptr, sharpness, lowest, candidates_ptr, V, LANES, REMOVED, STAGES)
            enough = count >= top_k
            if top_k == 0:
                enough = _weight(candidates_ptr, count, lowest, maximum, True, LANES) >= top_p * total
            if enough == 0:
                lowest = tl.full((), LOWEST, tl.int32)
                count = _collect(logits_ptr, sharpness, lowest, candidates_ptr, V, LANES, REMOVED, STAGES)
            if top_k > 0:
                lowest = _search(candidates_ptr, count, lowest, maximum, top_k.to(tl.float32), False, LANES)
                total = _weight(candidates_ptr, count, lowest, maximum, True, LANES)
            if top_p < 1:
                lowest = _search(candidates_ptr, count, lowest, maximum, top_p * total, True, LANES)
                total = _weight(candidates_ptr, count, lowest, maximum, True, LANES)
            tl.store(threshold_ptr + program, lowest)
        if NORMALISE:
            tl.store(maximum_ptr + program, maximum)
            tl.store(log_total_ptr + program, tl.log(total))
            tl.store(best_ptr + program, tl.min(tl.where(maxima == maximum, places, V), axis=0))


@triton.jit
def _mix(x0, x1, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Four rounds of Threefry."""
    x0 += x1
    x1 = ((x1 << A) | (x1 >> (32 - A))) ^ x0
    x0 += x1
    x1 = ((x1 << B) | (x1 >> (32 - B))) ^ x0
    x0 += x1
    x1 = ((x1 << C) | (x1 >> (32 - C))) ^ x0
    x0 += x1
    x1 = ((x1 << D) | (x1 >> (32 - D))) ^ x0
    return x0, x1


@triton.jit
def _uniform(key0, key1, counter):
    """``jax.random.uniform`` at a flat index below 2^32: Threefry-2x32 of 20 rounds, then 23 bits of mantissa."""
    key2 = key0 ^ key1 ^ 0x1BD11BDA
    x0 = tl.zeros_like(counter) + key0
    x1 = counter + key1
    x0, x1 = _mix(x0, x1, 13, 15, 26, 6)
    x0, x1 = _mix(x0 + key1, x1 + (key2 + 1), 17, 29, 16, 24)
    x0, x1 = _mix(x0 + key2, x1 + (key0 + 2), 13, 15, 26, 6)
    x0, x1 = _mix(x0 + key0, x1 + (key1 + 3), 17, 29, 16, 24)
    x0, x1 = _mix(x0 + key1, x1 + (key2 + 4), 13, 15, 26, 6)
    bits = (x0 + key2) ^ (x1 + (key0 + 5))
    return ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def _gumbel(high, low):
    """``jax.random.gumbel(mode="high")`` from its two uniforms."""
    fine = high + 1.1920928955078125e-07 * low + 1.1754943508222875e-38
    return -tl.log(-libdevice.log1p(-tl.where(high >= 0.5, high, fine)))


@triton.jit
def draw_rows(
    logits_all_ptr, row_ptr, greedy_ptr, sharpness_ptr, threshold_ptr, key_ptr, score_ptr, token_ptr,
    V: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, REMOVED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a part of a row: the token of the highest tempered logit plus noise, and that score.

    Half of the noise's bits tell the exact noise from its upper bound only. A value's noise is at most -log(high), so a
    value can win only if ``high <= exp(value - score of the best so far)``: a tile without such a value needs no more.
    """
    program = tl.program_id(0)
    part = tl.program_id(1)
    logits_ptr = logits_all_ptr + tl.load(row_ptr + program).to(tl.int64) * V
    greedy = tl.load(greedy_ptr + program) != 0
    sharpness = tl.load(sharpness_ptr + program)
    threshold = tl.load(threshold_ptr + program)
    key0 = tl.load(key_ptr + 2 * program)
    key1 = tl.load(key_ptr + 2 * program + 1)
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32) + part * PART
    lane = tl.arange(0, TILE)
    for offset in tl.range(0, PART, TILE, num_stages=STAGES):
        start = part * PART + offset
        index = start + lane
        scaled = _load(logits_ptr, index, index < V, sharpness, REMOVED)
        kept = tl.where(_order(scaled) >= threshold, scaled, float("-inf"))
        highest = tl.max(kept, axis=0)
        if greedy:
            if highest > best:
                best = highest
                token = start + tl.argmax(kept, axis=0, tie_break_left=True)
        elif highest > float("-inf"):
            high = _uniform(key0, key1, index.to(tl.uint32))
            # Rounding of scores is far below the slack; more candidates cost time only.
            slack = 1e-3 + 1e-6 * tl.abs(highest)
            able = (high <= tl.exp(kept - best + slack)) & (kept > float("-inf"))
            if tl.max(able.to(tl.int32), axis=0) > 0:
                low = _uniform(key0, key1, index.to(tl.uint32) + V)
                scores = tl.where(kept > float("-inf"), kept + _gumbel(high, low), float("-inf"))
                score = tl.max(scores, axis=0)
                if score > best:
                    best = score
                    token = start + tl.argmax(scores, axis=0, tie_break_left=True)
    slot = program * tl.num_programs(1) + part
    tl.store(score_ptr + slot, best)
    tl.store(token_ptr + slot, token)
