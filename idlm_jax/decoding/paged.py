"""A batch whose key/value cache lies in pages: the state it begins with, and pages given to requests between calls.

The host says which pages a request has (``idlm_jax.serving.pages``); the device never takes one by itself. A request
whose next window does not fit into its pages waits, unchanged, until it is given more.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Int

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.decoding.cache import BIN, PAGE, init_cache
from idlm_jax.decoding.generate import idle_state
from idlm_jax.decoding.step import DecodeState, Policy


def idle_paged_state(
    model: Qwen3, policy: Policy, requests: int, pages: int, pages_a_request: int, room: int, end_tokens: int
) -> DecodeState:
    """A batch of requests that are all done and have no pages, of ``pages`` in all (``BIN`` included)."""
    state = idle_state(model, policy, [(requests, 0)], room, end_tokens)
    return replace(
        state,
        cache=init_cache(model.config, pages, PAGE, model.dtype),
        pages=jnp.full((requests, pages_a_request), BIN, jnp.int32),
    )


def give_pages(state: DecodeState, request_F: Int[Array, " F"], pages_FN: Int[Array, "F N"]) -> DecodeState:
    """All pages that some requests have from now on, ``BIN`` after the last; none stops a request.

    Numbers of requests beyond the batch are passed over.
    """
    assert state.pages is not None
    slots_F = jnp.sum(pages_FN != BIN, axis=1) * state.cache[0][0].shape[2]
    return replace(
        state,
        pages=state.pages.at[request_F].set(pages_FN, mode="drop"),
        slots=state.slots.at[request_F].set(slots_F, mode="drop"),
    )
