"""The two Triton kernels of verification; ``gpu.py`` calls them.

``summarize_rows`` reads a row once, then the few values that matter again: it finds what the filters keep of the row,
and draws from that. ``draw_rows`` draws from rows that were not drawn from, by one read. Both see a row as ``logits *
sharpness`` in float32 and compare values as int32 of the same order, as the reference does.
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
def _draw(kept, index, key0, key1, best, token, V: tl.constexpr):
    """The highest value plus noise, and its token: of ``best`` and the values kept, which are -inf elsewhere.

    Half of the noise's bits tell the exact noise from its upper bound only. A value's noise is at most -log(high), so a
    value can win only if ``high <= exp(value - score of the best so far)``: values without such a one need no more.
    """
    highest = tl.max(kept, axis=0)
    if highest > float("-inf"):
        high = _uniform(key0, key1, index.to(tl.uint32))
        # Rounding of scores is far below the slack; more candidates cost time only.
        slack = 1e-3 + 1e-6 * tl.abs(highest)
        able = (high <= tl.exp(kept - best + slack)) & (kept > float("-inf"))
        if tl.max(able.to(tl.int32), axis=0) > 0:
            low = _uniform(key0, key1, index.to(tl.uint32) + V)
            scores = tl.where(kept > float("-inf"), kept + _gumbel(high, low), float("-inf"))
            score = tl.max(scores, axis=0)
            winner = tl.min(tl.where(scores == score, index, V), axis=0)  # of equals the lowest, whatever their order
            if (score > best) | ((score == best) & (winner < token)):
                best = score
                token = winner
    return best, token


@triton.jit
def _draw_candidates(values_ptr, tokens_ptr, count, lowest, key_ptr, V: tl.constexpr, TILE: tl.constexpr):
    """The token drawn from the candidates that reach ``lowest``."""
    key0 = tl.load(key_ptr)
    key1 = tl.load(key_ptr + 1)
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.full((), 0, tl.int32)
    lane = tl.arange(0, TILE)
    start = tl.full((), 0, tl.int32)
    while start < count:
        inside = start + lane < count
        values = tl.load(values_ptr + start + lane, mask=inside, other=float("-inf"))
        index = tl.load(tokens_ptr + start + lane, mask=inside, other=V)
        kept = tl.where(_order(values) >= lowest, values, float("-inf"))
        best, token = _draw(kept, index, key0, key1, best, token, V)
        start += TILE
    return token


@triton.jit
def _weight(
    values_ptr, count, lowest, maximum, by_mass, sharpness,
    TILE: tl.constexpr, REMOVED: tl.constexpr,
):  # fmt: skip
    """Mass (against the largest value) or number of the values from ``lowest`` on."""
    lane = tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    start = tl.full((), 0, tl.int32)
    while start < count:
        inside = start + lane < count
        values = _load(values_ptr, start + lane, inside, sharpness, REMOVED)
        weight = tl.where(by_mass, tl.exp(values - maximum), 1.0)
        total += tl.where(inside & (_order(values) >= lowest), weight, 0.0)
        start += TILE
    return tl.sum(total, axis=0)


@triton.jit
def _search(
    values_ptr, count, low, maximum, target, by_mass, sharpness,
    TILE: tl.constexpr, REMOVED: tl.constexpr,
):  # fmt: skip
    """The largest number, ``low`` at least, from which on the values weigh ``target``: bisects the float32 numbers."""
    high = _order(maximum)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # the upper average, without overflow
        weight = _weight(values_ptr, count, middle, maximum, by_mass, sharpness, TILE, REMOVED)
        enough = weight >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _lowest_kept(
    values_ptr, count, lowest, maximum, total, top_k, top_p, sharpness,
    TILE: tl.constexpr, REMOVED: tl.constexpr,
):  # fmt: skip
    """Top-k, then top-p: the lowest value that both keep, ``lowest`` at least, and the mass of those kept."""
    if top_k > 0:
        target = top_k.to(tl.float32)
        lowest = _search(values_ptr, count, lowest, maximum, target, False, sharpness, TILE, REMOVED)
        total = _weight(values_ptr, count, lowest, maximum, True, sharpness, TILE, REMOVED)
    if top_p < 1:
        target = top_p * total
        lowest = _search(values_ptr, count, lowest, maximum, target, True, sharpness, TILE, REMOVED)
        total = _weight(values_ptr, count, lowest, maximum, True, sharpness, TILE, REMOVED)
    return lowest, total


@triton.jit
def _collect(
    logits_ptr, sharpness, lowest, values_ptr, tokens_ptr,
    V: tl.constexpr, ROOM: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    REMOVED: tl.constexpr,
):  # fmt: skip
    """Store the row's tempered values from ``lowest`` on, and their tokens; their number, above ROOM if too many.

    Behind ROOM are the maxima of the groups; beside them the numbers of the groups to read are listed.
    """
    AT_ONCE: tl.constexpr = LANES // GROUP
    lane = tl.arange(0, LANES)
    groups = tl.full((), 0, tl.int32)
    for start in range(0, GROUPS, LANES):
        maxima = tl.load(values_ptr + ROOM + start + lane)
        taken = (_order(maxima) >= lowest).to(tl.int32)
        tl.store(tokens_ptr + ROOM + groups + tl.cumsum(taken, axis=0) - 1, start + lane, mask=taken > 0)
        groups += tl.sum(taken, axis=0)
    tl.debug_barrier()  # also for whoever still reads the lanes' maxima, which make room for candidates
    count = tl.full((), 0, tl.int32)
    start = tl.full((), 0, tl.int32)
    while (start < groups) & (count <= ROOM):
        slot = start + lane % AT_ONCE
        group = tl.load(tokens_ptr + ROOM + slot, mask=slot < groups, other=GROUPS)  # which lies outside the row
        token = (group // LANES * GROUP + lane // AT_ONCE) * LANES + group % LANES
        values = _load(logits_ptr, token, token < V, sharpness, REMOVED)
        taken = ((_order(values) >= lowest) & (token < V)).to(tl.int32)
        place = count + tl.cumsum(taken, axis=0) - 1
        # Those without room, fewer than LANES, overwrite the list, which is read no further then.
        tl.store(values_ptr + place, values, mask=taken > 0)
        tl.store(tokens_ptr + place, token, mask=taken > 0)
        count += tl.sum(taken, axis=0)
        start += AT_ONCE
    tl.debug_barrier()
    return count


@triton.jit
def summarize_rows(
    logits_all_ptr, row_ptr, greedy_ptr, sharpness_ptr, top_k_ptr, top_p_ptr, key_ptr,
    threshold_ptr, maximum_ptr, log_total_ptr, best_ptr, token_ptr, values_all_ptr, tokens_all_ptr,
    V: tl.constexpr, ROOM: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    REMOVED: tl.constexpr, NORMALISE: tl.constexpr, DRAW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a row: threshold of top-k, then top-p; with NORMALISE the largest value, where it is, and log-sum.

    Value i of the row belongs to lane ``i % LANES``. The first read keeps every lane's maximum. The k-th largest of
    these is a lower bound of the row's k-th largest value, and rarely far below it; so for top-p is the maximum from
    which on maxima alone have enough mass. What reaches the bound are the candidates: the thresholds are bisected among
    them, and with DRAW the token is drawn from them. To find them without reading the row again, the maxima of every
    GROUP successive values of a lane are stored. Where candidates do not suffice (top-k above the number of lanes,
    top-p of a flat row) or are too many, thresholds are bisected in the row itself, and -1 stands for the token.
    """
    program = tl.program_id(0)
    greedy = tl.load(greedy_ptr + program) != 0
    sharpness = tl.load(sharpness_ptr + program)
    top_k = tl.load(top_k_ptr + program)
    top_p = tl.load(top_p_ptr + program)
    filtering = ((top_k > 0) | (top_p < 1)) & ~greedy
    weighing = (top_k == 0) | greedy  # else the mass of all values is of no use
    tl.store(threshold_ptr + program, LOWEST)
    tl.store(token_ptr + program, -1)
    if NORMALISE or filtering:
        logits_ptr = logits_all_ptr + tl.load(row_ptr + program).to(tl.int64) * V
        values_ptr = values_all_ptr + program.to(tl.int64) * (ROOM + GROUPS)
        tokens_ptr = tokens_all_ptr + program.to(tl.int64) * (ROOM + GROUPS)
        lane = tl.arange(0, LANES)
        maxima = tl.full((LANES,), FLOOR, tl.float32)
        of_group = tl.full((LANES,), FLOOR, tl.float32)
        totals = tl.zeros((LANES,), tl.float32)
        places = tl.zeros((LANES,), tl.int32)
        for start in tl.range(0, V, LANES, num_stages=STAGES):
            values = _load(logits_ptr, start + lane, start + lane < V, sharpness, REMOVED)
            higher = values > maxima
            if weighing:
                ratio = tl.exp(-tl.abs(values - maxima))
                totals = tl.where(higher, totals * ratio + 1.0, totals + ratio)
            places = tl.where(higher, start + lane, places)
            maxima = tl.maximum(maxima, values)
            of_group = tl.maximum(of_group, values)
            if filtering & ((start // LANES % GROUP == GROUP - 1) | (start + LANES >= V)):
                tl.store(values_ptr + ROOM + start // LANES // GROUP * LANES + lane, of_group)
                of_group = tl.full((LANES,), FLOOR, tl.float32)
        maximum = tl.max(maxima, axis=0)
        total = tl.sum(totals * tl.exp(maxima - maximum), axis=0)
        if NORMALISE:
            tl.store(maximum_ptr + program, maximum)
            tl.store(best_ptr + program, tl.min(tl.where(maxima == maximum, places, V), axis=0))
        if filtering:
            by_mass = (top_k == 0) & (tl.sum(tl.exp(maxima - maximum), axis=0) >= top_p * total)
            # For top-p without enough mass, the bound that 7/8 of the lanes reach: about 2 LANES candidates.
            rank = tl.where(top_k > 0, tl.minimum(top_k, LANES * 7 // 8), LANES * 7 // 8).to(tl.float32)
            target = tl.where(by_mass, top_p * total, rank)
            tl.store(values_ptr + lane, maxima)
            tl.debug_barrier()
            lowest = _order(tl.min(maxima, axis=0))
            lowest = _search(values_ptr, LANES, lowest, maximum, target, by_mass, 1.0, LANES, -1)
            count = _collect(
                logits_ptr, sharpness, lowest, values_ptr, tokens_ptr, V, ROOM, LANES, GROUP, GROUPS, REMOVED
            )
            enough = (count <= ROOM) & (by_mass | (count >= top_k))
            FEW: tl.constexpr = LANES // 4
            if enough & (top_k == 0) & ~by_mass:
                enough = _weight(values_ptr, count, lowest, maximum, True, 1.0, FEW, -1) >= top_p * total
            if enough:
                lowest, total = _lowest_kept(values_ptr, count, lowest, maximum, total, top_k, top_p, 1.0, FEW, -1)
                if DRAW:
                    token = _draw_candidates(values_ptr, tokens_ptr, count, lowest, key_ptr + 2 * program, V, FEW)
                    tl.store(token_ptr + program, token)
            else:
                lowest = tl.full((), LOWEST, tl.int32)
                lowest, total = _lowest_kept(
                    logits_ptr, V, lowest, maximum, total, top_k, top_p, sharpness, LANES, REMOVED
                )
            tl.store(threshold_ptr + program, lowest)
        if NORMALISE:
            tl.store(log_total_ptr + program, tl.log(total))


@triton.jit
def draw_rows(
    logits_all_ptr, row_ptr, greedy_ptr, sharpness_ptr, threshold_ptr, drawn_ptr, key_ptr, score_ptr, token_ptr,
    V: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, REMOVED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a part of a row: the token of the highest tempered logit plus noise, and that score.

    Of a row that was drawn from already, all parts pass the token on.
    """
    program = tl.program_id(0)
    part = tl.program_id(1)
    logits_ptr = logits_all_ptr + tl.load(row_ptr + program).to(tl.int64) * V
    greedy = tl.load(greedy_ptr + program) != 0
    sharpness = tl.load(sharpness_ptr + program)
    threshold = tl.load(threshold_ptr + program)
    drawn = tl.load(drawn_ptr + program)
    key0 = tl.load(key_ptr + 2 * program)
    key1 = tl.load(key_ptr + 2 * program + 1)
    best = tl.full((), float("-inf"), tl.float32)
    token = tl.where(drawn < 0, part * PART, drawn)
    lane = tl.arange(0, TILE)
    if drawn < 0:
        for offset in tl.range(0, PART, TILE, num_stages=STAGES):
            index = part * PART + offset + lane
            scaled = _load(logits_ptr, index, index < V, sharpness, REMOVED)
            kept = tl.where(_order(scaled) >= threshold, scaled, float("-inf"))
            if greedy:
                highest = tl.max(kept, axis=0)
                if highest > best:
                    best = highest
                    token = tl.min(tl.where(kept == highest, index, V), axis=0)
            else:
                best, token = _draw(kept, index, key0, key1, best, token, V)
    slot = program * tl.num_programs(1) + part
    tl.store(score_ptr + slot, best)
    tl.store(token_ptr + slot, token)
