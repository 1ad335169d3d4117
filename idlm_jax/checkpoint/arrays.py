"""Moving one tensor: host memory layout, dtype, device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Of a part of a tensor.
Index = tuple[slice, ...]
# Side of the square tiles in which a matrix is transposed; five times as fast as numpy's own copy, which misses the
# cache at every element.
_TILE = 256


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in row-major order; a copy only when it is not already."""
    if array.flags.c_contiguous:
        return array
    if array.ndim != 2:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    for row in range(0, array.shape[0], _TILE):
        for column in range(0, array.shape[1], _TILE):
            tile = np.s_[row : row + _TILE, column : column + _TILE]
            out[tile] = array[tile]
    return out


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def to_device(array: np.ndarray, dtype: jnp.dtype | None) -> jax.Array:
    """One tensor on the default device, in ``dtype`` or its own; a transposed view is transposed there, not here."""
    array, dtype = _narrowed(array, dtype)
    if array.ndim == 2 and array.T.flags.c_contiguous:
        return jnp.asarray(array.T).T.astype(dtype)
    return jax.device_put(contiguous(array)).astype(dtype)


def to_devices(
    read: Callable[[Index], np.ndarray],
    shape: tuple[int, ...],
    dtype: jnp.dtype | None,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    """One tensor spread over devices, in ``dtype`` or its own; ``read`` gives the parts that this process needs."""

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        array, own = _narrowed(read(index), dtype)
        return contiguous(array).astype(own, copy=False)

    return jax.make_array_from_callback(shape, sharding, part)


def _narrowed(array: np.ndarray, dtype: jnp.dtype | None) -> tuple[np.ndarray, jnp.dtype]:
    """Narrow before the transfer, widen after it: the array, and the dtype it is to have in the end."""
    dtype = jnp.dtype(array.dtype if dtype is None else dtype)
    return (array.astype(dtype) if dtype.itemsize < array.dtype.itemsize else array), dtype
