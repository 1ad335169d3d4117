"""The Triton kernels between the products of a decode layer; ``gpu.py`` calls them.

All three take an unfinished product (``product.Product``) of R rows by C columns, N of them before those of the
LoRA's first half; row r is row ``r % W`` of its request's window. A program finishes the tile of it that it needs.

A program of few rows does little but wait for memory, so each kernel asks for all that it reads before it computes.
Two things would break that up. Triton passes what the tensor cores multiply through shared memory as soon as it is
loaded; it does not where a sum along an axis comes between, of the summands, or of one element for a LoRA's second
matrix. And ptxas puts off loads to spare registers; it puts none off past a barrier, hence those between loads.
Imports Triton, so it is imported only where these kernels are chosen.
"""

# Triton compiles these functions: their arguments are pointers and constants, not JAX arrays.
import triton
import triton.language as tl


@triton.jit
def _parts(parts_ptr, row, column, inside, R: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr):
    """The summands of a tile of the product: rows, summands, columns.

    Triton spreads threads over columns, then over rows: a thread holds all summands of its elements.
    """
    first_ptr = parts_ptr + (row[:, None] * C + column[None, :])[:, None, :]
    return tl.load(first_ptr + tl.arange(0, SPLITS)[None, :, None] * R * C, mask=inside[:, None, :], other=0.0)


@triton.jit
def _shrunk(
    parts_ptr, row, real, part, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """The summands of the columns of the product that are the first half of the LoRA of one projection, if any."""
    shrunk = tl.zeros((row.shape[0], SPLITS, RANKS), tl.float32)
    if RANK > 0:
        rank = tl.arange(0, RANKS)
        inside = real[:, None] & (rank < RANK)[None, :]
        shrunk = _parts(parts_ptr + N, row, part * RANK + rank, inside, R, C, SPLITS)
    return shrunk


@triton.jit
def _expanding(b_ptr, column, inside, N: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr):
    """Columns of the second half of the LoRA, if any: ranks, one, columns."""
    b = tl.zeros((RANKS, 1, column.shape[0]), b_ptr.dtype.element_ty)
    if RANK > 0:
        rank = tl.arange(0, RANKS)
        b_inside = (rank < RANK)[:, None] & inside[None, :]
        b = tl.load(b_ptr + (rank[:, None] * N + column[None, :])[:, None, :], mask=b_inside[:, None, :], other=0.0)
    return b


@triton.jit
def _vector(ptr, column, inside, ABSENT: tl.constexpr, PRESENT: tl.constexpr):
    """Columns of a bias or a scale; ABSENT without one."""
    vector = tl.full((column.shape[0],), ABSENT, tl.float32)
    if PRESENT:
        vector = tl.load(ptr + column, mask=inside, other=ABSENT).to(tl.float32)
    return vector


@triton.jit
def _squares(squares_ptr, row, real, T: tl.constexpr, TILES: tl.constexpr):
    """Sums of squares of the rows that went into the product, tile by tile; zeros where it is not to be normed."""
    tile = tl.arange(0, TILES)
    inside = real[:, None] & (tile < T)[None, :]
    return tl.load(squares_ptr + row[:, None] * T + tile[None, :], mask=inside, other=0.0)


@triton.jit
def _finished(
    parts, shrunk, b, squares, bias, row,
    W: tl.constexpr, T: tl.constexpr, INPUTS: tl.constexpr, EPSILON: tl.constexpr,
    RANK: tl.constexpr, LORA_SCALE: tl.constexpr, FIRST_ROW: tl.constexpr,
):  # fmt: skip
    """A tile of the finished product."""
    parts = parts.to(tl.float32)
    if RANK > 0:
        shrunk = tl.sum(shrunk.to(tl.float32), axis=1).to(b.dtype)
        delta = tl.dot(shrunk, tl.sum(b, axis=1).to(b.dtype), input_precision="ieee")
        # Added to the first summand, it is all that leaves the layout of the tensor cores. Rows before the first
        # adapted one stay what they are, bit for bit.
        first = tl.arange(0, parts.shape[1]) == 0
        adapted = (row % W >= FIRST_ROW)[:, None, None] & first[None, :, None]
        parts = tl.where(adapted, parts + LORA_SCALE * delta[:, None, :], parts)
    y = tl.sum(parts, axis=1)
    if T > 0:
        y = y / tl.sqrt(tl.sum(squares, axis=1) / INPUTS + EPSILON)[:, None]
    return y + bias[None, :]


@triton.jit
def add_rows(
    x_ptr, scale_ptr, parts_ptr, bias_ptr, squares_in_ptr, b_ptr, sum_ptr, scaled_ptr, squares_ptr,
    R: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
    T: tl.constexpr, TILES: tl.constexpr, INPUTS: tl.constexpr, EPSILON: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, LORA_SCALE: tl.constexpr, FIRST_ROW: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows and columns: residual sum, the sum times the next norm's scale, sums of squares."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = row < R
    within = column < N
    inside = real[:, None] & within[None, :]
    index = row[:, None] * N + column[None, :]
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + column, mask=within, other=0.0)
    squares_in = _squares(squares_in_ptr, row, real, T, TILES)
    parts = _parts(parts_ptr, row, column, inside, R, C, SPLITS)
    bias = _vector(bias_ptr, column, within, 0.0, BIAS)
    b = _expanding(b_ptr, column, within, N, RANK, RANKS)
    if RANK > 0:
        tl.debug_barrier()
    shrunk = _shrunk(parts_ptr, row, real, 0, R, C, N, SPLITS, RANK, RANKS)
    y = _finished(
        parts, shrunk, b, squares_in, bias, row, W, T, INPUTS, EPSILON, RANK, LORA_SCALE, FIRST_ROW
    )  # fmt: skip
    rounded = (x.to(tl.float32) + y).to(x.dtype)
    x = rounded.to(tl.float32)
    tl.store(sum_ptr + index, rounded, mask=inside)
    tl.store(scaled_ptr + index, (x * scale.to(tl.float32)[None, :]).to(rounded.dtype), mask=inside)
    squares = tl.sum(tl.where(inside, x * x, 0.0), axis=1)
    tl.store(squares_ptr + row * tl.num_programs(1) + tl.program_id(1), squares, mask=real)


@triton.jit
def gate_rows(
    parts_ptr, bias_ptr, squares_in_ptr, b_ptr, out_ptr,
    R: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
    T: tl.constexpr, TILES: tl.constexpr, INPUTS: tl.constexpr, EPSILON: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, LORA_SCALE: tl.constexpr, FIRST_ROW: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows and columns: ``silu(gate) * up``, the two halves of the product."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = row < R
    within = column < N // 2
    inside = real[:, None] & within[None, :]
    squares_in = _squares(squares_in_ptr, row, real, T, TILES)
    gate = _parts(parts_ptr, row, column, inside, R, C, SPLITS)
    up = _parts(parts_ptr + N // 2, row, column, inside, R, C, SPLITS)
    gate_bias = _vector(bias_ptr, column, within, 0.0, BIAS)
    up_bias = _vector(bias_ptr + N // 2, column, within, 0.0, BIAS)
    gate_b = _expanding(b_ptr, column, within, N, RANK, RANKS)
    up_b = _expanding(b_ptr + N // 2, column, within, N, RANK, RANKS)
    if RANK > 0:
        tl.debug_barrier()
    gate_shrunk = _shrunk(parts_ptr, row, real, 0, R, C, N, SPLITS, RANK, RANKS)
    up_shrunk = _shrunk(parts_ptr, row, real, 1, R, C, N, SPLITS, RANK, RANKS)
    gate = _finished(
        gate, gate_shrunk, gate_b, squares_in, gate_bias, row,
        W, T, INPUTS, EPSILON, RANK, LORA_SCALE, FIRST_ROW,
    )  # fmt: skip
    up = _finished(
        up, up_shrunk, up_b, squares_in, up_bias, row,
        W, T, INPUTS, EPSILON, RANK, LORA_SCALE, FIRST_ROW,
    )  # fmt: skip
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row[:, None] * (N // 2) + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_rows(
    parts_ptr, bias_ptr, squares_in_ptr, b_ptr, q_scale_ptr, k_scale_ptr, cos_ptr, sin_ptr, length_ptr,
    pages_ptr, k_old_ptr, v_old_ptr, q_ptr, k_ptr, v_ptr,
    R: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
    T: tl.constexpr, TILES: tl.constexpr, INPUTS: tl.constexpr, EPSILON: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, LORA_SCALE: tl.constexpr, FIRST_ROW: tl.constexpr,
    FIRST: tl.constexpr, POOL: tl.constexpr, H: tl.constexpr, K: tl.constexpr, S: tl.constexpr, PAGES: tl.constexpr,
    HALF: tl.constexpr, NORM: tl.constexpr, TILES_Q: tl.constexpr, TILE_WINDOW: tl.constexpr, STORED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows and a head of queries, keys or values, rows of the requests FIRST … FIRST + POOL - 1.

    Queries go to an array of their own, [POOL, W, H, d], or packed, [POOL, K, TILES_Q, STORED, d], if STORED > 0.
    Keys and values go to their slots of the caches, which are the outputs: [POOL, K, S, d], or if PAGES > 0 pages of
    this shape, of which a request's table names PAGES.
    """
    pool_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = pool_row < POOL * W
    row = FIRST * W + pool_row
    request = pool_row // W
    window_row = pool_row % W
    head = tl.program_id(1)
    part = (head >= H).to(tl.int32) + (head >= H + K).to(tl.int32)
    half = tl.arange(0, HALF)
    column = head * 2 * HALF + half
    within = column < N
    inside = real[:, None] & within[None, :]
    length = tl.load(length_ptr + FIRST + request, mask=real, other=0)
    index = row[:, None] * HALF + half[None, :]
    # Values are divided by one, scaled by one and turned by nothing: a branch would keep loads waiting before it.
    cos = tl.load(cos_ptr + index, mask=real[:, None] & (part < 2), other=1.0)
    sin = tl.load(sin_ptr + index, mask=real[:, None] & (part < 2), other=0.0)
    one_bias = _vector(bias_ptr, column, within, 0.0, BIAS)
    two_bias = _vector(bias_ptr + HALF, column, within, 0.0, BIAS)
    scale_ptr = q_scale_ptr if part == 0 else k_scale_ptr
    one_scale = _vector(scale_ptr, half, (half < HALF) & (part < 2), 1.0, NORM)
    two_scale = _vector(scale_ptr + HALF, half, (half < HALF) & (part < 2), 1.0, NORM)
    tl.debug_barrier()
    squares_in = _squares(squares_in_ptr, row, real, T, TILES)
    one = _parts(parts_ptr, row, column, inside, R, C, SPLITS)
    two = _parts(parts_ptr + HALF, row, column, inside, R, C, SPLITS)
    one_b = _expanding(b_ptr, column, within, N, RANK, RANKS)
    two_b = _expanding(b_ptr + HALF, column, within, N, RANK, RANKS)
    page = request
    slot = tl.minimum(length, S - W) + window_row
    if PAGES > 0:
        slot = length + window_row
        page = tl.load(pages_ptr + request * PAGES + tl.minimum(slot // S, PAGES - 1), mask=real, other=0)
        slot %= S
    if RANK > 0:
        tl.debug_barrier()
    shrunk = _shrunk(parts_ptr, row, real, part, R, C, N, SPLITS, RANK, RANKS)
    one = _finished(
        one, shrunk, one_b, squares_in, one_bias, row,
        W, T, INPUTS, EPSILON, RANK, LORA_SCALE, FIRST_ROW,
    )  # fmt: skip
    two = _finished(
        two, shrunk, two_b, squares_in, two_bias, row,
        W, T, INPUTS, EPSILON, RANK, LORA_SCALE, FIRST_ROW,
    )  # fmt: skip
    if NORM:
        root = tl.sqrt(tl.sum(one * one + two * two, axis=1) / (2 * HALF) + EPSILON)
        root = tl.where(part < 2, root, 1.0)[:, None]
        one = one / root * one_scale[None, :]
        two = two / root * two_scale[None, :]
    turned = one * cos - two * sin
    two = two * cos + one * sin
    one = turned
    if part == 0:
        place = (pool_row * H + head).to(tl.int64)
        if STORED > 0:
            tile = (request * K + head // (H // K)) * TILES_Q + window_row // TILE_WINDOW
            place = (tile * STORED + window_row % TILE_WINDOW * (H // K) + head % (H // K)).to(tl.int64)
        out_ptr = q_ptr
    else:
        place = (page.to(tl.int64) * K + (head - H) % K) * S + slot
        out_ptr = k_ptr
        if part == 2:
            out_ptr = v_ptr
    out_ptr += place[:, None] * 2 * HALF + half[None, :]
    tl.store(out_ptr, one.to(q_ptr.dtype.element_ty), mask=real[:, None])
    tl.store(out_ptr + HALF, two.to(q_ptr.dtype.element_ty), mask=real[:, None])
