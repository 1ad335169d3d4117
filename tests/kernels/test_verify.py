"""Verification: the API anywhere; the Triton kernels, interpreted on the CPU or run on a GPU, beside the reference."""

import importlib.util
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.verify import api, reference
from pallas_kernels.verify.reference import COUPLINGS, LOWEST, PURPOSE_TOKEN, Drafts, Filters, RatioCoupling
from tests.kernels import interpreted_triton
from tests.kernels.interpreted_triton import HAS_TRITON, MODES, ON_GPU, interpret

if HAS_TRITON:
    import triton
    import triton.language as tl

    from pallas_kernels.verify import gpu, triton_kernels

_reference_verify = jax.jit(reference.verify, static_argnames=("coupling", "removed"))
_reference_draft = jax.jit(reference.draft, static_argnames=("coupling", "removed"))
_reference_log_probs = jax.jit(reference.filtered_log_probs)
# More than two tiles of every loop of the kernels, and no multiple of one.
VOCAB, REMOVED = 9001, 7


@pytest.fixture(params=MODES)
def kernels(request, monkeypatch):
    if request.param == "interpreted":
        interpret(monkeypatch, gpu, triton_kernels)
    return request.param


def make_filters(*settings):
    """Filters from (temperature, top_k, top_p) of each request; request i has seed i."""
    temperature, top_k, top_p = zip(*settings, strict=True)
    seeds = jax.vmap(jax.random.key)(jnp.arange(len(settings)))
    return Filters(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), seeds)


def normal_logits(seed, *shape, scale=3.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def rows_of(batch, *rows):
    return jnp.tile(jnp.asarray(rows, jnp.int32), (batch, 1))


def test_unknown_or_impossible_implementations_are_refused():
    logits, filters, drafts = jnp.zeros((1, 1, 8)), make_filters((1.0, 0, 1.0)), Drafts(jnp.zeros((1, 0), int), None)
    arguments = (logits, filters, COUPLINGS["gumbel"], drafts, jnp.ones(1, bool), jnp.zeros((1, 1), int))
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        api.verify(*arguments, implementation="cuda")
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        api.draft(logits, rows_of(1), filters, COUPLINGS["gumbel"], rows_of(1), implementation="cuda")
    if not ON_GPU:
        with pytest.raises(ValueError, match="verify: 'triton' does not run here: needs a GPU, not cpu"):
            api.verify(*arguments, implementation="triton")


@pytest.mark.parametrize(
    ("device", "changes", "reason"),
    [
        ("gpu 9.0", {"dtype": jnp.bfloat16}, "needs float32 logits, not bfloat16"),
        ("gpu 8.0", {"key_impl": "rbg"}, "knows the noise of partitionable threefry2x32 keys alone"),
        ("gpu 9.0", {"coupling": RatioCoupling(name="own")}, "knows no coupling 'own'"),
        ("tpu", {}, "needs a GPU, not tpu"),
    ],
)
def test_auto_takes_triton_only_where_it_runs_and_says_why_not(device, changes, reason, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(dispatch, "version", lambda name: "0.3.1")
    monkeypatch.setattr(pallas_kernels, "BY_DEFAULT", True)
    monkeypatch.setattr(dispatch, "device", lambda: device)
    dispatch._announce.cache_clear()

    def choose(dtype=jnp.float32, key_impl="threefry2x32", coupling=COUPLINGS["ratio"]):
        filters = make_filters((1.0, 0, 1.0))
        filters = replace(filters, key=jax.random.split(jax.random.key(0, impl=key_impl), 1))
        return api._implementation("auto", jnp.zeros((1, 1, 8), dtype), filters, coupling)

    with caplog.at_level(logging.INFO):
        assert choose(**changes) == "xla"
        assert choose() == ("triton" if device.startswith("gpu") else "xla")
    assert caplog.messages[0] == f"verify: xla on {device} (triton: {reason})"


def test_on_a_mesh_and_without_jax_triton_the_reference_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "device", lambda: "gpu 9.0")
    arguments = jnp.zeros((1, 1, 8)), make_filters((1.0, 0, 1.0)), COUPLINGS["gumbel"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "jax-triton" in api._obstacle(*arguments)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(dispatch, "version", lambda name: "0.4.1")
    assert api._obstacle(*arguments) == "needs jax-triton 0.3 (the extra 'gpu'), not 0.4.1"
    monkeypatch.setattr(dispatch, "version", lambda name: "0.3.1")
    assert api._obstacle(*arguments) is None
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        assert api._obstacle(jnp.zeros((1, 1, 8)), *arguments[1:]) == "does not run on a mesh"


@pytest.mark.parametrize("name", COUPLINGS)
def test_the_reference_removes_the_mask_token_from_clean_and_mask_rows(name):
    logits = normal_logits(0, 2, 5, 16).at[:, :, REMOVED].set(50.0)
    filters, coupling = make_filters((1.0, 3, 0.9), (0.0, 0, 1.0)), COUPLINGS[name]
    drafts = _reference_draft(logits, rows_of(2, 3, 4), filters, coupling, rows_of(2, 1, 2), REMOVED)
    warm, positions = jnp.ones(2, bool), rows_of(2, 0, 1, 2)
    accepted, token = _reference_verify(logits, filters, coupling, drafts, warm, positions, REMOVED)
    assert not (drafts.tokens == REMOVED).any()
    assert not (token == REMOVED).any()
    assert (accepted <= 2).all()


# The kernels, against the reference.


def test_uniforms_are_those_of_jax_bit_for_bit_and_noise_to_rounding(kernels, monkeypatch):
    @triton.jit
    def noise_kernel(key_ptr, uniform_ptr, gumbel_ptr, V: tl.constexpr):
        index = tl.arange(0, V)
        high = triton_kernels._uniform(tl.load(key_ptr), tl.load(key_ptr + 1), index.to(tl.uint32))
        low = triton_kernels._uniform(tl.load(key_ptr), tl.load(key_ptr + 1), index.to(tl.uint32) + V)
        tl.store(uniform_ptr + index, high)
        tl.store(uniform_ptr + V + index, low)
        tl.store(gumbel_ptr + index, triton_kernels._gumbel(high, low))

    size = 65536
    for seed in (0, 2**31 + 5):
        key = jax.random.fold_in(jax.random.key(seed), 3)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, size), (size,))]
        uniform, gumbel = gpu.jax_triton.triton_call(
            jax.random.key_data(key), kernel=noise_kernel, out_shape=shapes, grid=(1,), num_warps=8, V=size
        )
        np.testing.assert_array_equal(uniform, jax.random.uniform(key, (2, size)))
        assert (np.asarray(uniform[0]) < 0.5).any()
        np.testing.assert_allclose(gumbel, jax.random.gumbel(key, (size,), mode="high"), rtol=1e-6, atol=1e-6)


def hard_rows():
    """Rows of logits that a search by candidates could get wrong."""
    rng = np.random.default_rng(1)
    flat, ties = np.full(VOCAB, 2.5), rng.integers(-3, 4, VOCAB)
    zeros = np.where(rng.random(VOCAB) < 0.5, 0.0, -0.0)
    few = np.full(VOCAB, -np.inf)
    few[[3, REMOVED, VOCAB - 1]] = [1.0, 9.0, 1.0]
    last = rng.normal(size=VOCAB)
    last[-1] = 20
    block = rng.normal(size=VOCAB)  # all large values in few lanes: the bound is far below the k-th
    block[4096:4100] += 20
    block[:4] += 20
    return {
        "normal": rng.normal(size=VOCAB) * 3,
        "peaked": rng.normal(size=VOCAB) * 8,
        "nearly flat": rng.normal(size=VOCAB) * 1e-3,
        "flat": flat,
        "ties": ties,
        "zeros": zeros,
        "few": few,
        "huge": rng.normal(size=VOCAB) * 1e6,
        "negative": -rng.random(VOCAB) * 1e-3 - 50,
        "lanes": block,
        "last": last,
    }


EVERY_SETTING = [
    (1.0, 0, 1.0),
    (1.0, 1, 1.0),
    (0.7, 50, 0.95),
    (1.3, 4000, 1.0),
    (1.0, VOCAB + 5, 0.5),
    (0.6, 0, 0.9),
    (1.0, 0, 0.999),
    (0.01, 3, 0.3),
    (0.0, 5, 0.5),
]
CASES = {name: [(0.7, 50, 0.95), (1.3, 4000, 1.0), (0.6, 0, 0.9)] for name in hard_rows()} | {"normal": EVERY_SETTING}


@pytest.mark.parametrize("name", CASES)
def test_filters_keep_what_the_reference_keeps(kernels, name, monkeypatch):
    monkeypatch.setattr(gpu, "_FEW_ROWS", 128 if name == "normal" else 1)
    logits, settings = jnp.asarray(hard_rows()[name], jnp.float32), CASES[name]
    filters = make_filters(*settings)
    logits_BWV, row_BR = jnp.broadcast_to(logits, (len(settings), 1, VOCAB)), rows_of(len(settings), 0)
    summary = gpu.summarize(logits_BWV, row_BR, filters, REMOVED, normalise=True)
    ours = np.asarray(gpu._log_prob_rows(logits_BWV, row_BR, summary, filters, REMOVED))[:, 0]
    expected = np.asarray(_reference_log_probs(reference.without_token(logits_BWV, REMOVED), filters))[:, 0]
    for setting, mine, theirs in zip(settings, ours, expected, strict=True):
        different = np.isfinite(mine) != np.isfinite(theirs)
        if different.any():  # allowed where float32 sums decide: the masses kept differ by rounding
            larger = mine if np.isfinite(mine).sum() > np.isfinite(theirs).sum() else theirs
            assert setting[2] < 1, setting
            assert np.exp(np.float64(larger[different])).sum() < 1e-3, (setting, different.sum())
            assert different.sum() <= 2, setting
        both = np.isfinite(mine) & np.isfinite(theirs)
        tolerance = 2e-3 if different.any() else 2e-5
        np.testing.assert_allclose(mine[both], theirs[both], atol=tolerance, rtol=2e-6, err_msg=str(setting))


def test_thresholds_are_the_same_without_normalising(kernels):
    logits, row_BR = normal_logits(8, 3, 2, VOCAB), rows_of(3, 1)
    filters = make_filters((1.0, 30, 0.9), (1.0, 0, 1.0), (0.0, 7, 0.5))
    full, bare = (gpu.summarize(logits, row_BR, filters, REMOVED, normalise=flag) for flag in (True, False))
    np.testing.assert_array_equal(bare.threshold, full.threshold)
    assert (bare.threshold[1:] == LOWEST).all()
    assert bare.threshold[0, 0] > LOWEST


def check_draws(tokens, log_p_BRV, filters, position_BR, purpose=PURPOSE_TOKEN):
    """Tokens are the reference's, or score as high within rounding."""
    keys = reference.row_keys(filters.key, position_BR, purpose)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, log_p_BRV.shape[2:], mode="high")))(keys)
    scores = np.asarray(log_p_BRV + noise)
    of_tokens = np.take_along_axis(scores, np.asarray(tokens)[:, :, None], axis=2)[:, :, 0]
    scale = np.abs(np.where(np.isfinite(log_p_BRV), log_p_BRV, 0)).max(axis=2)
    assert (of_tokens >= scores.max(axis=2) - 1e-6 * (1 + scale)).all()
    return float((np.asarray(tokens) != scores.argmax(axis=2)).mean())


def check_filtered_draws(row_of_setting, monkeypatch, room=8):
    """Draws of rows with filters are the reference's; whether they were made from candidates.

    Scratch begins as -inf here: no maximum that was never stored may make a group seem worth reading.
    """
    poison = lambda shape: np.full(shape.shape, -np.inf if shape.dtype == jnp.float32 else 2**31 - 1, shape.dtype)  # noqa: E731
    monkeypatch.setattr(interpreted_triton, "_poison", poison)
    monkeypatch.setattr(gpu, "_FEW_ROWS", 1)
    monkeypatch.setattr(gpu, "_GROUP", 2)  # several groups a lane, the last one ragged
    monkeypatch.setattr(gpu, "_ROOM", room)
    logits_BWV = jnp.asarray([row for row, _ in row_of_setting], jnp.float32)[:, None]
    filters = make_filters(*[setting for _, setting in row_of_setting])
    row_B1, position = rows_of(len(logits_BWV), 0), 10 + jnp.arange(len(logits_BWV))[:, None]
    keys = reference.row_keys(filters.key, position, PURPOSE_TOKEN)
    summary = gpu.summarize(logits_BWV, row_B1, filters, REMOVED, normalise=False, key_BR=keys)
    tokens = gpu.draw(logits_BWV, row_B1, filters, summary.threshold, summary.token, keys, REMOVED)
    log_p = _reference_log_probs(reference.without_token(logits_BWV, REMOVED), filters)
    assert check_draws(tokens, log_p, filters, position) == 0
    drawn = np.asarray(summary.token)[:, 0] >= 0
    np.testing.assert_array_equal(tokens[drawn], summary.token[drawn])
    return drawn.tolist()


def test_filtered_rows_are_drawn_from_their_candidates_and_as_by_the_reference(kernels, monkeypatch):
    rows = hard_rows()
    both, top_p, nucleus = (0.7, 50, 0.95), (0.6, 0, 0.9), (1.0, 0, 0.9)
    cases = {
        # Bounds by rank, by mass, and by rank for lack of mass.
        True: [("normal", both), ("peaked", both), ("peaked", nucleus), ("lanes", both), ("lanes", top_p),
               ("few", nucleus), ("nearly flat", (0.7, 800, 0.95)), ("normal", (0.8, 0, 0.8)), ("last", both)],
        # More than fit, fewer than top-k, not enough mass; greedy and unfiltered rows among them.
        False: [("flat", both), ("few", both), ("nearly flat", top_p), ("peaked", (0.0, 5, 0.5)),
                ("normal", (1.0, 0, 1.0))],
    }  # fmt: skip
    mixed = [(rows[name], setting, candidates) for candidates in cases for name, setting in cases[candidates]][::-1]
    drawn = check_filtered_draws([case[:2] for case in mixed], monkeypatch)
    assert drawn == [case[2] for case in mixed]


def test_candidates_may_fill_their_room_and_not_one_more(kernels, monkeypatch):
    rows = [np.where(np.arange(VOCAB) < size, 3.0, 0.0) for size in (1024 + 1, 1024 + 2)]  # one of them removed
    assert check_filtered_draws([(row, (1.0, 900, 1.0)) for row in rows], monkeypatch, room=1) == [True, False]


@pytest.mark.parametrize("few_rows", [1, 128])
def test_ties_of_candidates_go_to_the_lowest_token_whatever_their_order(kernels, few_rows, monkeypatch):
    monkeypatch.setattr(gpu, "_FEW_ROWS", few_rows)
    monkeypatch.setattr(gpu, "_GROUP", 2)
    rng = np.random.default_rng(3)
    logits = np.zeros((4, 1, VOCAB), np.float32)
    for row, lowest in enumerate((0, 1023, 2047, 4095)):  # a last lane's group is listed after those of other lanes
        logits[row, 0, rng.choice(np.arange(lowest, VOCAB), 600, replace=False)] = 2e9  # noise is below its rounding
        logits[row, 0, lowest] = 2e9
    keys = jax.random.split(jax.random.key(0), (4, 1))
    filters = make_filters(*[(1.0, 3, 1.0)] * 4)
    summary = gpu.summarize(jnp.asarray(logits), rows_of(4, 0), filters, None, normalise=False, key_BR=keys)
    np.testing.assert_array_equal(summary.token[:, 0], [0, 1023, 2047, 4095])


@pytest.mark.parametrize("few_rows", [1, 128])  # a part of a row is all of its tiles, and one
def test_draws_are_the_argmax_of_the_reference_for_hard_rows(kernels, few_rows, monkeypatch):
    monkeypatch.setattr(gpu, "_FEW_ROWS", few_rows)
    rows = [row for name, row in hard_rows().items() if name != "huge"]
    rows += [np.linspace(-30, 30, VOCAB), np.linspace(30, -30, VOCAB), np.linspace(0, 9, VOCAB)]
    logits_BWV = jnp.asarray(rows, jnp.float32)[:, None]
    filters = make_filters(*[(1.0, 0, 1.0)] * len(rows))
    row_B1, position = rows_of(len(rows), 0), 10 + jnp.arange(len(rows))[:, None]
    everything, nothing = jnp.full(row_B1.shape, LOWEST), jnp.full(row_B1.shape, -1)
    keys = reference.row_keys(filters.key, position, PURPOSE_TOKEN)
    tokens = gpu.draw(logits_BWV, row_B1, filters, everything, nothing, keys, REMOVED)
    log_p = _reference_log_probs(reference.without_token(logits_BWV, REMOVED), filters)
    assert check_draws(tokens, log_p, filters, position) == 0


@pytest.mark.parametrize("few_rows", [1, 128])
def test_ties_go_to_the_lowest_token_across_tiles_and_parts(kernels, few_rows, monkeypatch):
    monkeypatch.setattr(gpu, "_FEW_ROWS", few_rows)
    monkeypatch.setattr(gpu, "_TILE", 1024)
    logits = jnp.zeros((1, 1, VOCAB)).at[0, 0, jnp.array([5, 4000, 8999])].set(1.0)
    for removed, winner in ((None, 5), (5, 4000)):
        keys = reference.row_keys(jax.random.key(0)[None], jnp.zeros((1, 1), int), PURPOSE_TOKEN)
        greedy, everything, nothing = make_filters((0.0, 0, 1.0)), jnp.full((1, 1), LOWEST), jnp.full((1, 1), -1)
        assert gpu.draw(logits, rows_of(1, 0), greedy, everything, nothing, keys, removed)[0, 0] == winner


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_round_of_mixed_requests_equals_the_reference(kernels, name):
    """Stride 3: verify and draft, warm and cold, requests that differ in every filter."""
    coupling, stride = COUPLINGS[name], 3
    settings = [(0.3, 0, 1.0), (0.8, 20, 0.9), (0.0, 0, 1.0), (0.5, 0, 0.8)]
    batch, filters = len(settings), make_filters(*settings)
    logits = normal_logits(5, batch, 2 * stride - 1, VOCAB)
    logits = logits.at[:, stride:].set(logits[:, : stride - 1] + 0.2 * logits[:, stride:])
    positions = 4 + rows_of(batch, 0, 1, 2)
    drafts = gpu.draft(logits, rows_of(batch, 3, 4), filters, coupling, positions[:, :-1], REMOVED)
    expected = _reference_draft(logits, rows_of(batch, 3, 4), filters, coupling, positions[:, :-1], REMOVED)
    np.testing.assert_array_equal(drafts.tokens, expected.tokens)
    if coupling.stores_q:
        np.testing.assert_allclose(drafts.log_q, expected.log_q, atol=2e-5)
    warm = jnp.arange(batch) != 2
    ours = gpu.verify(logits, filters, coupling, expected, warm, positions, REMOVED)
    theirs = _reference_verify(logits, filters, coupling, expected, warm, positions, REMOVED)
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert len(set(np.asarray(ours[0]).tolist())) > 1


@pytest.mark.parametrize("name", COUPLINGS)
def test_stride_one_and_a_vocabulary_smaller_than_a_tile(kernels, name):
    coupling, small = COUPLINGS[name], 61
    filters = make_filters((1.0, 0, 1.0), (0.7, 5, 0.9), (1.0, 80, 0.7))
    logits, positions = normal_logits(6, 3, 1, small), rows_of(3, 3)
    none = Drafts(jnp.zeros((3, 0), jnp.int32), jnp.zeros((3, 0, small)) if coupling.stores_q else None)
    ours = gpu.verify(logits, filters, coupling, none, jnp.zeros(3, bool), positions, None)
    theirs = _reference_verify(logits, filters, coupling, none, jnp.zeros(3, bool), positions, None)
    np.testing.assert_array_equal(ours, theirs)


def test_neighbours_never_change_a_row_bit_for_bit(kernels):
    settings = [(1.0, 30, 0.9), (0.9, 0, 0.9), (1.0, 0, 1.0)]
    logits, row_BR, filters = normal_logits(7, 3, 2, VOCAB), rows_of(3, 0), make_filters(*settings)
    keys = reference.row_keys(filters.key, row_BR, PURPOSE_TOKEN)
    quiet = gpu.summarize(logits, row_BR, filters, REMOVED, normalise=True, key_BR=keys)
    loud_logits = logits.at[:, 1].set(jnp.nan).at[1, 0].set(1e30)
    loud = gpu.summarize(loud_logits, row_BR, filters, REMOVED, normalise=True, key_BR=keys)
    tokens = [
        gpu.draw(array, row_BR, filters, summary.threshold, summary.token, keys, REMOVED)
        for array, summary in ((logits, quiet), (loud_logits, loud))
    ]
    for before, after in zip(jax.tree.leaves((quiet, tokens[0])), jax.tree.leaves((loud, tokens[1])), strict=True):
        np.testing.assert_array_equal(before[jnp.array([0, 2])], after[jnp.array([0, 2])])


@pytest.mark.gpu
@pytest.mark.parametrize("name", COUPLINGS)
@pytest.mark.parametrize("batch", [1, 33])
def test_the_kernels_equal_the_reference_at_the_size_of_qwen3(name, batch):
    coupling, vocabulary = COUPLINGS[name], 151_936
    cycle = [(1.0, 0, 1.0), (0.7, 50, 0.95), (1.0, 0, 0.95), (0.0, 0, 1.0), (0.6, 20, 1.0), (1.2, 5000, 0.99)]
    filters = make_filters(*(cycle * batch)[:batch])
    logits = jax.random.normal(jax.random.key(1), (batch, 7, vocabulary)) * 3
    logits = logits.at[:, 4:].set(logits[:, :3] + 0.2 * logits[:, 4:])
    positions = 9 + rows_of(batch, 0, 1, 2, 3)
    draft = jax.jit(api.draft, static_argnames=("coupling", "removed", "implementation"))
    verify = jax.jit(api.verify, static_argnames=("coupling", "removed", "implementation"))
    results = {}
    for implementation in ("xla", "triton"):
        options = {"coupling": coupling, "removed": 16, "implementation": implementation}
        drafts = draft(logits, rows_of(batch, 4, 5, 6), filters, position_Bd=positions[:, :-1], **options)
        warm = jnp.arange(batch) % 5 != 4
        outcome = verify(logits, filters, drafts=drafts, warm_B=warm, position_BN=positions, **options)
        results[implementation] = jax.device_get((drafts.tokens, *outcome))
    differing = [np.mean(a != b) for a, b in zip(results["xla"], results["triton"], strict=True)]
    # Only top-p decided by rounding and ties of scores may differ.
    assert max(differing) <= 0.02 if batch > 1 else max(differing) == 0


COMPILE = """
import os, re, subprocess, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pallas_kernels.verify import gpu
from pallas_kernels.verify import triton_kernels as kernels

os.environ["TRITON_CACHE_DIR"] = sys.argv[1]  # jax_triton has set it to nothing
INTEGERS = ("row", "greedy", "top_k", "threshold", "best", "token", "drawn", "tokens_all")
TYPES = {name: "*i32" for name in INTEGERS} | {"key": "*u32"}
COMMON = dict(V=151936, REMOVED=16)
CASES = []
for warps in gpu._WARPS:
    lanes = gpu._WARP_LANES * warps
    groups = lanes * -(-151936 // (gpu._GROUP * lanes))
    shape = dict(LANES=lanes, ROOM=gpu._ROOM * lanes, GROUP=gpu._GROUP, GROUPS=groups, STAGES=gpu._STAGES)
    for normalise, draw in ((False, True), (True, True), (True, False)):
        CASES.append((kernels.summarize_rows, warps, shape | dict(NORMALISE=normalise, DRAW=draw)))
tiles = dict(PART=75 * gpu._TILE, TILE=gpu._TILE, STAGES=gpu._DRAW_STAGES)
CASES += [(kernels.draw_rows, gpu._DRAW_WARPS, tiles)]
for kernel, warps, constants in CASES:
    constants |= COMMON
    pointers = [name for name in kernel.arg_names if name not in constants]
    signature = {name: TYPES.get(name.removesuffix("_ptr"), "*fp32") for name in pointers}
    signature |= {name: "constexpr" for name in constants}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps} | gpu._COMMON)
    path = os.path.join(sys.argv[1], "kernel.ptx")
    open(path, "w").write(compiled.asm["ptx"])
    ptxas = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
    told = subprocess.run([ptxas, "-arch=sm_90a", "-v", path, "-o", os.devnull], capture_output=True, text=True).stderr
    registers, spills = re.search(r"Used (\\d+) registers", told)[1], re.search(r"(\\d+) bytes spill stores", told)[1]
    print(kernel.__name__, warps, registers, spills, compiled.metadata.shared)
"""


@pytest.mark.aot
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_kernels_compile_for_an_h100_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    print(run.stdout)
    assert len(lines) == 7
    for name, warps, registers, spills, shared in lines:
        assert spills == "0", (name, warps, registers)
        # Four programs a multiprocessor at least, or one of 8 warps, which serves few rows.
        assert int(registers) * int(warps) * 32 <= (65536 if warps == "8" else 16384), (name, warps, registers)
        assert int(shared) <= 100_000
