"""What holds for all tests."""

import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

_MAPS = Path("/proc/self/maps")
# Of the 65530 that Linux gives a process (vm.max_map_count). Each compiled program takes several; beyond, XLA aborts.
_MANY_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def room_for_compiled_programs() -> Iterator[None]:
    """Drop compiled programs between modules when there are many."""
    yield
    if _MAPS.exists() and len(_MAPS.read_bytes().splitlines()) > _MANY_MAPS:
        jax.clear_caches()
        gc.collect()
