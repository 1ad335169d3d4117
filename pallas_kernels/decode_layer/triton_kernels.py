"""The Triton kernels between the products of a decode layer; ``gpu.py`` calls them.

All three take an unfinished product (``product.Product``) of R rows by C columns, N of them before those of the
LoRA's first half; row r is row ``r % W`` of its request's window. A program finishes the tile of it that it needs.
Imports Triton, so it is imported only where these kernels are chosen.
"""

# Triton compiles these functions: their arguments are pointers and constants, not JAX arrays.
import triton
import triton.language as tl


@triton.jit
def _summed(parts_ptr, row, column, inside, R: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr):
    """A tile of the product: its summands added in order."""
    index = row[:, None] * C + column[None, :]
    total = tl.load(parts_ptr + index, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts_ptr + split * R * C + index, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _shrunk(
    parts_ptr, row, real, part, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """The columns of the product that are the first half of the LoRA of one projection."""
    rank = tl.arange(0, RANKS)
    inside = real[:, None] & (rank < RANK)[None, :]
    return _summed(parts_ptr, row, N + part * RANK + rank, inside, R, C, SPLITS)


@triton.jit
def _squares(squares_ptr, row, real, T: tl.constexpr, TILES: tl.constexpr):
    """Sums of squares of the rows that went into the product, tile by tile; zeros where it is not to be normed."""
    tile = tl.arange(0, TILES)
    inside = real[:, None] & (tile < T)[None, :]
    return tl.load(squares_ptr + row[:, None] * T + tile[None, :], mask=inside, other=0.0)


@triton.jit
def _finished(
    parts_ptr, bias_ptr, b_ptr, shrunk, squares, row, real, column,
    R: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
    T: tl.constexpr, INPUTS: tl.constexpr, EPSILON: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, LORA_SCALE: tl.constexpr, FIRST_ROW: tl.constexpr,
):  # fmt: skip
    """A tile of the finished product."""
    inside = real[:, None] & (column < N)[None, :]
    y = _summed(parts_ptr, row, column, inside, R, C, SPLITS)
    if RANK > 0:
        rank = tl.arange(0, RANKS)
        b_inside = (rank < RANK)[:, None] & (column < N)[None, :]
        b = tl.load(b_ptr + rank[:, None] * N + column[None, :], mask=b_inside, other=0.0)
        delta = tl.dot(shrunk.to(b.dtype), b, input_precision="ieee")
        # Rows before the first adapted one stay what they are, bit for bit.
        y = tl.where((row % W >= FIRST_ROW)[:, None], y + LORA_SCALE * delta, y)
    if T > 0:
        y = y / tl.sqrt(tl.sum(squares, axis=1) / INPUTS + EPSILON)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return y


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
    inside = real[:, None] & (column < N)[None, :]
    index = row[:, None] * N + column[None, :]
    # All that comes from memory is asked for before anything waits for it.
    squares_in = _squares(squares_in_ptr, row, real, T, TILES)
    x = tl.load(x_ptr + index, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    shrunk = squares_in
    if RANK > 0:
        shrunk = _shrunk(parts_ptr, row, real, 0, R, C, N, SPLITS, RANK, RANKS)
    y = _finished(
        parts_ptr, bias_ptr, b_ptr, shrunk, squares_in, row, real, column,
        R, W, C, N, SPLITS, BIAS, T, INPUTS, EPSILON, RANK, RANKS, LORA_SCALE, FIRST_ROW,
    )  # fmt: skip
    rounded = (x.to(tl.float32) + y).to(x.dtype)
    x = rounded.to(tl.float32)
    tl.store(sum_ptr + index, rounded, mask=inside)
    tl.store(scaled_ptr + index, (x * scale[None, :]).to(rounded.dtype), mask=inside)
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
    squares_in = _squares(squares_in_ptr, row, real, T, TILES)
    shrunk_gate = squares_in
    shrunk_up = squares_in
    if RANK > 0:
        shrunk_gate = _shrunk(parts_ptr, row, real, 0, R, C, N, SPLITS, RANK, RANKS)
        shrunk_up = _shrunk(parts_ptr, row, real, 1, R, C, N, SPLITS, RANK, RANKS)
    gate = _finished(
        parts_ptr, bias_ptr, b_ptr, shrunk_gate, squares_in, row, real, column,
        R, W, C, N, SPLITS, BIAS, T, INPUTS, EPSILON, RANK, RANKS, LORA_SCALE, FIRST_ROW,
    )  # fmt: skip
    up = _finished(
        parts_ptr, bias_ptr, b_ptr, shrunk_up, squares_in, row, real, N // 2 + column,
        R, W, C, N, SPLITS, BIAS, T, INPUTS, EPSILON, RANK, RANKS, LORA_SCALE, FIRST_ROW,
    )  # fmt: skip
    inside = real[:, None] & (column < N // 2)[None, :]
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row[:, None] * (N // 2) + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotate_rows(
    parts_ptr, bias_ptr, squares_in_ptr, b_ptr, q_scale_ptr, k_scale_ptr, cos_ptr, sin_ptr, length_ptr,
    k_old_ptr, v_old_ptr, q_ptr, k_ptr, v_ptr,
    R: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
    T: tl.constexpr, TILES: tl.constexpr, INPUTS: tl.constexpr, EPSILON: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, LORA_SCALE: tl.constexpr, FIRST_ROW: tl.constexpr,
    FIRST: tl.constexpr, POOL: tl.constexpr, H: tl.constexpr, K: tl.constexpr, S: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program a tile of rows and a head of queries, keys or values, rows of the requests FIRST … FIRST + POOL - 1.

    Queries go to an array of their own, keys and values to their slots of the caches, which are the outputs.
    """
    pool_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = pool_row < POOL * W
    row = FIRST * W + pool_row
    head = tl.program_id(1)
    part = (head >= H).to(tl.int32) + (head >= H + K).to(tl.int32)
    half = tl.arange(0, HALF)
    squares_in = _squares(squares_in_ptr, row, real, T, TILES)
    index = row[:, None] * HALF + half[None, :]
    cos = tl.load(cos_ptr + index, mask=real[:, None] & (part < 2), other=0.0)
    sin = tl.load(sin_ptr + index, mask=real[:, None] & (part < 2), other=0.0)
    shrunk = squares_in
    if RANK > 0:
        shrunk = _shrunk(parts_ptr, row, real, part, R, C, N, SPLITS, RANK, RANKS)
    one = _finished(
        parts_ptr, bias_ptr, b_ptr, shrunk, squares_in, row, real, head * 2 * HALF + half,
        R, W, C, N, SPLITS, BIAS, T, INPUTS, EPSILON, RANK, RANKS, LORA_SCALE, FIRST_ROW,
    )  # fmt: skip
    two = _finished(
        parts_ptr, bias_ptr, b_ptr, shrunk, squares_in, row, real, (head * 2 + 1) * HALF + half,
        R, W, C, N, SPLITS, BIAS, T, INPUTS, EPSILON, RANK, RANKS, LORA_SCALE, FIRST_ROW,
    )  # fmt: skip
    if part < 2:
        if NORM:
            scale_ptr = (q_scale_ptr if part == 0 else k_scale_ptr) + half
            squares = tl.sum(one * one, axis=1) + tl.sum(two * two, axis=1)
            root = tl.sqrt(squares / (2 * HALF) + EPSILON)[:, None]
            one = one / root * tl.load(scale_ptr).to(tl.float32)[None, :]
            two = two / root * tl.load(scale_ptr + HALF).to(tl.float32)[None, :]
        turned = one * cos - two * sin
        two = two * cos + one * sin
        one = turned
    if part == 0:
        out_ptr = q_ptr + (pool_row[:, None] * H + head) * 2 * HALF + half[None, :]
    else:
        request = pool_row // W
        start = tl.load(length_ptr + FIRST + request, mask=real, other=0)
        slot = tl.minimum(start, S - W) + pool_row % W
        place = (request.to(tl.int64) * K + (head - H) % K) * S + slot
        cache_ptr = k_ptr
        if part == 2:
            cache_ptr = v_ptr
        out_ptr = cache_ptr + place[:, None] * 2 * HALF + half[None, :]
    tl.store(out_ptr, one.to(q_ptr.dtype.element_ty), mask=real[:, None])
    tl.store(out_ptr + HALF, two.to(q_ptr.dtype.element_ty), mask=real[:, None])
