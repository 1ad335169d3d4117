"""The forward pass by few launches where no kernel can run: with the operations' reference in place of the kernels."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import decode_layer
from pallas_kernels.decode_layer import api, reference


@contextmanager
def by_operations() -> Iterator[Counter]:
    """Inside, models are prepared for the kernels, and those of decode layers are the reference; counts their use."""
    used: Counter = Counter()

    def counted(name: str, *arguments: Any) -> Any:
        used[name] += 1
        operation: Callable[..., Any] = getattr(reference, name)
        return operation(*arguments)

    operations = SimpleNamespace(**{name: partial(counted, name) for name in ("add", "gated", "rotate_and_store")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_kernels, "BY_DEFAULT", True)
        patch.setattr(api, "_obstacle", lambda: None)
        patch.setattr(api, "DTYPES", (*api.DTYPES, jnp.dtype("float32")))
        patch.setattr(api, "HEAD_DIMS", (*api.HEAD_DIMS, 8))
        patch.setattr(decode_layer, "gpu", operations, raising=False)
        patch.setitem(sys.modules, f"{decode_layer.__name__}.gpu", operations)
        yield used
