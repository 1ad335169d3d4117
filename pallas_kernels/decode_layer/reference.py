"""What stands between the matrix products of a decode layer, in plain jnp: the oracle of the kernels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.packing import Packing
from pallas_kernels.decode_attention.reference import place_in_pages
from pallas_kernels.decode_layer.product import Normed, Product

# Columns whose squares are summed together.
TILE = 64


def scale_rows(x_BWD: Float[Array, "B W D"], scale_D: Float[Array, " D"]) -> Normed:
    """The part of an RMSNorm that goes before the product."""
    x32 = x_BWD.astype(jnp.float32)
    squares = jnp.pad(jnp.square(x32), ((0, 0), (0, 0), (0, -x32.shape[-1] % TILE)))
    squares_BWT = jnp.sum(squares.reshape(*x32.shape[:2], -1, TILE), axis=-1)
    return Normed((x32 * scale_D.astype(jnp.float32)).astype(x_BWD.dtype), squares_BWT)


def add(
    x_BWD: Float[Array, "B W D"], product: Product, scale_D: Float[Array, " D"]
) -> tuple[Float[Array, "B W D"], Normed]:
    """The product added to the residual stream, and the sum with the scale of the norm that comes next."""
    x = (x_BWD.astype(jnp.float32) + product.finished()).astype(x_BWD.dtype)
    return x, scale_rows(x, scale_D)


def gated(product: Product, dtype: jnp.dtype) -> Float[Array, "B W F"]:
    """``silu(gate) * up`` of the halves of a product."""
    gate, up = jnp.split(product.finished(), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)


def rotate_and_store(
    product: Product,
    scales: tuple[Float[Array, " d"], Float[Array, " d"]] | None,
    tables: tuple[Float[Array, "B W half"], Float[Array, "B W half"]],
    k_PKSd: Float[Array, "P K S d"],
    v_PKSd: Float[Array, "P K S d"],
    length_B: Int[Array, " B"],
    first: int = 0,
    pack: Packing | None = None,
    pages_BN: Int[Array, "B N"] | None = None,
) -> tuple[Float[Array, "P W H d"] | Float[Array, "P K T stored d"], Float[Array, "P K S d"], Float[Array, "P K S d"]]:
    """Queries, keys and values side by side in a product, each head normed and rotated; keys and values are stored.

    ``scales`` are those of the norms of queries and keys, with the epsilon of the product, None without such
    norms. The caches belong to the P requests from ``first`` on; each stores its rows at slots ``length …``, moved back
    to where they fit. With ``pages``, the caches are pages of S slots and belong to all requests: slot s of request b
    lies in page ``pages[b, s // S]``, and no two requests may store rows in one place but where nobody reads.
    Returns the queries of these requests, packed if ``pack`` says how, and the caches.
    """
    _, heads, slots, head_dim = k_PKSd.shape
    requests = len(k_PKSd if pages_BN is None else pages_BN)
    pool = slice(first, first + requests)
    y = product.finished()[pool]
    rows = y.shape[1]
    y = y.reshape(requests, rows, -1, head_dim)
    query_heads = y.shape[2] - 2 * heads
    q, k, v = jnp.split(y, [query_heads, query_heads + heads], axis=2)
    if scales is not None:
        q, k = (
            x
            * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + product.epsilon)
            * scale.astype(jnp.float32)
            for x, scale in zip((q, k), scales, strict=True)
        )
    cos, sin = (table[pool, :, None] for table in tables)

    def rotated(x: Array) -> Array:
        one, two = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    if pages_BN is None:
        start_P = jnp.minimum(length_B[pool], slots - rows)
        place = jnp.arange(requests)[:, None], start_P[:, None] + jnp.arange(rows)
    else:
        place = place_in_pages(pages_BN, length_B[:, None] + jnp.arange(rows), slots)

    def stored(cache: Array, x: Array) -> Array:
        return cache.at[place[0], :, place[1]].set(x.astype(cache.dtype))

    q = rotated(q).astype(k_PKSd.dtype)
    return q if pack is None else pack.packed(q), stored(k_PKSd, rotated(k)), stored(v_PKSd, v)
