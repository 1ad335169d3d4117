"""Mask groups against per-token Python, their draw, and what their rows may see (design.md 6, method.md 2.2)."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from idlm_jax.backbone.sharding import BATCH_AXES, MESH_AXES
from idlm_jax.training.groups import STARTS, Batch, GroupPolicy, NoisyRows, draw_groups
from tests.training.support import KEY, batch_of, compiled, random_batch, streams, tiny_builder, tiny_params

LENGTH, MASK = 24, 99
ALIGNED = [GroupPolicy(block, "aligned", density=3.0) for block in (1, 2, 3, 7)]
RANDOM = [GroupPolicy(1, density=1.0), GroupPolicy(3, density=1.0), GroupPolicy(7, density=0.5)]

draw = partial(compiled, static_argnums=(1, 2))(draw_groups)


class Group(NamedTuple):
    """One mask group: its row of the batch, where it begins, and every row with loss as (position, target)."""

    row: int
    start: int
    first_key: int
    rows: tuple[tuple[int, int], ...]


@st.composite
def packed_rows(draw: st.DrawFn, rows: int = 2) -> Batch:
    """Documents of all lengths, with any loss mask, packed into rows; garbage where there is no document."""
    segments = np.zeros((rows, LENGTH), int)
    for row in segments:
        at, segment = 0, 1
        for size in draw(st.lists(st.integers(1, 12), max_size=5)):
            row[at : at + size] = segment
            at, segment = at + size, segment + 1
    loss_mask = np.array(draw(st.lists(st.booleans(), min_size=rows * LENGTH, max_size=rows * LENGTH)))
    # Runs, as answers are, rather than single tokens.
    for _ in range(draw(st.integers(0, 2))):
        loss_mask |= np.roll(loss_mask, 1)
    seed = draw(st.integers(0, 99))
    tokens = np.random.default_rng(seed).integers(0, MASK, (rows, LENGTH))
    return batch_of(tokens, loss_mask.reshape(rows, LENGTH) & (segments > 0), segments)


def documents(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """(row, begin, end) of every document."""
    for row, segments in enumerate(np.asarray(batch.segment_ids)):
        for segment in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == segment)
            yield row, int(where[0]), int(where[-1]) + 1


def wanted_group(batch: Batch, row: int, begin: int, start: int, end: int) -> Group:
    """The group of the tokens ``start … end - 1`` of a document that begins at ``begin``; all of them are learnt."""
    tokens, learnt, segments = (np.asarray(a)[row] for a in (batch.tokens, batch.loss_mask, batch.segment_ids))
    rows = tuple(
        (i - begin, int(tokens[i + 1]))
        for i in range(start, end)
        if i + 1 < LENGTH and segments[i + 1] == segments[i] and learnt[i + 1]
    )
    return Group(row, start, begin, rows)


def learnt_run(batch: Batch, row: int, start: int, limit: int) -> int:
    """The end of the learnt tokens from ``start`` on, ``limit`` at the latest."""
    learnt = np.asarray(batch.loss_mask)[row]
    end = start
    while end < limit and learnt[end]:
        end += 1
    return end


def official_groups(batch: Batch, block: int) -> list[Group]:
    """Every run of learnt tokens inside a block (blocks are counted from the start of the document) that has a row
    with loss: the official noisy half without the rows that equal clean ones."""
    groups = []
    for row, begin, end in documents(batch):
        for first in range(begin, end, block):
            at, limit = first, min(first + block, end)
            while at < limit:
                stop = learnt_run(batch, row, at, limit)
                group = wanted_group(batch, row, begin, at, stop)
                groups += [group] if group.rows else []
                at = max(stop, at + 1)
    return groups


def group_at(batch: Batch, block: int, row: int, start: int) -> Group:
    """The group of the decoder that begins at ``start``, at most to the end of the answer."""
    begin, end = next((b, e) for r, b, e in documents(batch) if r == row and b <= start < e)
    return wanted_group(batch, row, begin, start, learnt_run(batch, row, start, min(start + block, end)))


def draftable(batch: Batch) -> list[tuple[int, int]]:
    """(row, index) of learnt tokens that follow a token and are followed by a learnt one of their document."""
    learnt = np.asarray(batch.loss_mask)
    return [
        (row, i)
        for row, begin, end in documents(batch)
        for i in range(begin + 1, end - 1)
        if learnt[row, i] and learnt[row, i + 1]
    ]


def found_groups(rows: NoisyRows, block: int) -> list[Group]:
    """Groups that have a row with loss; checks what holds for every row on the way."""
    arrays = {name: np.asarray(getattr(rows, name)) for name in rows.__dataclass_fields__}
    assert (arrays["tokens"] == MASK).all()
    groups = []
    for row in range(len(arrays["tokens"])):
        one = {name: array[row].reshape(-1, block) for name, array in arrays.items() if name != "left_out"}
        for i in np.flatnonzero(one["is_target"].any(axis=1)):
            target = one["is_target"][i]
            start, first = one["key_end"][i, 0], one["key_start"][i, 0]
            assert (one["key_end"][i] == start).all() and (one["key_start"][i] == first).all()
            # Row j stands j positions behind the first, which follows the last visible token.
            assert (one["positions"][i] == start - first + np.arange(block)).all()
            assert (one["clean_row"][i][target] == start + np.flatnonzero(target)).all()
            pairs = zip(one["positions"][i][target], one["targets"][i][target], strict=True)
            groups.append(Group(row, int(start), int(first), tuple((int(a), int(b)) for a, b in pairs)))
    return groups


@pytest.mark.parametrize("policy", ALIGNED, ids=lambda policy: str(policy.block_size))
@settings(max_examples=50, deadline=None)
@given(batch=packed_rows())
def test_aligned_groups_are_the_official_masked_rows_that_have_a_target(policy: GroupPolicy, batch: Batch) -> None:
    rows = draw(batch, policy, MASK, KEY)
    assert found_groups(rows, policy.block_size) == official_groups(batch, policy.block_size)
    assert not np.asarray(rows.left_out).any()
    # Each masked row that has a target is there exactly once.
    expected = np.asarray(batch.loss_mask & batch.clean_targets)
    for row in range(len(expected)):
        where = np.asarray(rows.clean_row)[row][np.asarray(rows.is_target)[row]]
        assert list(where) == list(np.flatnonzero(expected[row]))


@settings(max_examples=50, deadline=None)
@given(batch=packed_rows(), seed=st.integers(0, 9))
@pytest.mark.parametrize("policy", RANDOM, ids=lambda policy: str(policy.block_size))
def test_random_groups_are_drafts_that_the_decoder_could_make(policy: GroupPolicy, batch: Batch, seed: int) -> None:
    rows = draw(batch, policy, MASK, jax.random.key(seed))
    groups = found_groups(rows, policy.block_size)
    starts = [(group.row, group.start) for group in groups]
    possible = draftable(batch)
    # Without replacement, in the order of the text, as many as were asked for or as there are.
    assert starts == sorted(set(starts)) and set(starts) <= set(possible)
    for row in range(len(batch.tokens)):
        count = sum(1 for possible_row, _ in possible if possible_row == row)
        assert sum(1 for start_row, _ in starts if start_row == row) == min(policy.groups(LENGTH), count)
    assert groups == [group_at(batch, policy.block_size, *start) for start in starts]
    assert not np.asarray(rows.left_out).any()


def test_no_group_reaches_past_a_hole_of_the_loss_mask() -> None:
    """A prompt of the second turn at 8 … 10: the decoder has stopped there."""
    learnt = np.ones((1, LENGTH), bool)
    learnt[0, [0, 1, 8, 9, 10]] = False
    batch = batch_of(np.arange(LENGTH)[None], learnt)
    for policy in (GroupPolicy(7, "aligned", density=3.0), GroupPolicy(7, density=7.0)):
        for group in found_groups(draw(batch, policy, MASK, KEY), 7):
            last = group.first_key + group.rows[-1][0]
            assert group.start > 10 or last < 7
            assert all(target == position + 1 for position, target in group.rows)


@pytest.mark.parametrize(
    ("density", "block", "random", "aligned"),
    [
        (1.0, 3, 8, 8),
        (1.0, 7, 8, 8),
        (0.5, 4, 2, 4),
        (1.9, 3, 8, 16),
        (2.0, 3, 16, 16),
        (0.01, 2, 4, 4),
        (9.0, 1, 24, 24),
    ],
)
@pytest.mark.parametrize("starts", STARTS)
def test_density_is_noisy_rows_a_clean_token_in_whole_tiles(
    density: float, block: int, random: int, aligned: int, starts: str
) -> None:
    policy = GroupPolicy(block, starts, density)
    groups = random if starts == "random" else aligned
    assert policy.groups(LENGTH) == groups
    batch = batch_of(np.zeros((1, LENGTH), int), np.ones((1, LENGTH), bool))
    assert draw(batch, policy, MASK, KEY).tokens.shape == (1, groups * block)


@settings(max_examples=30, deadline=None)
@given(batch=packed_rows())
def test_aligned_groups_that_do_not_fit_are_counted_and_the_first_ones_kept(batch: Batch) -> None:
    policy = GroupPolicy(2, "aligned", density=0.2)
    wanted = official_groups(batch, 2)
    rows = draw(batch, policy, MASK, KEY)
    kept = found_groups(rows, 2)
    for row in range(len(batch.tokens)):
        of_row = [group for group in wanted if group.row == row]
        assert [group for group in kept if group.row == row] == of_row[: policy.groups(LENGTH)]
        assert rows.left_out[row] == max(len(of_row) - policy.groups(LENGTH), 0)


def draws(groups: int, count: int) -> np.ndarray:
    """The starts of ``groups`` groups of one batch, at ``count`` keys."""
    batch = random_batch(1, LENGTH, 9, seed=3)
    policy = GroupPolicy(8, density=groups * 8 / LENGTH)
    assert policy.groups(LENGTH) == groups
    keys = jax.random.split(jax.random.key(5), count)
    rows = compiled(jax.vmap(lambda key: draw_groups(batch, policy, MASK, key)))(keys)
    assert np.asarray(rows.is_target)[:, 0, ::8].all()
    return np.asarray(rows.key_end)[:, 0, ::8]


@pytest.mark.parametrize("groups", [1, 2])
def test_every_set_of_starts_is_equally_likely(groups: int) -> None:
    possible = [start for _, start in draftable(random_batch(1, LENGTH, 9, seed=3))]
    assert len(possible) >= 8
    sets, counts = np.unique(draws(groups, 20_000), axis=0, return_counts=True)
    number = len(possible) if groups == 1 else len(possible) * (len(possible) - 1) // 2
    assert len(sets) == number
    assert stats.chisquare(counts).pvalue > 1e-3


def test_a_key_draws_the_same_groups_again_and_another_key_others() -> None:
    batch = random_batch(2, LENGTH, 9)
    one, same, other = (np.asarray(draw(batch, RANDOM[1], MASK, jax.random.key(seed)).key_end) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])


@pytest.mark.parametrize("policy", [*ALIGNED, *RANDOM], ids=lambda policy: f"{policy.starts}-{policy.block_size}")
def test_noisy_rows_are_split_over_a_mesh_like_their_batch_also_a_single_one(policy: GroupPolicy) -> None:
    mesh = jax.make_mesh((1, 1, 1), MESH_AXES, devices=jax.devices()[:1])
    split = PartitionSpec(BATCH_AXES, None)
    with jax.set_mesh(mesh):
        batch = jax.device_put(random_batch(1, LENGTH, 9), NamedSharding(mesh, split))
        rows = jax.eval_shape(lambda batch: draw_groups(batch, policy, MASK, KEY), batch)
    for name in NoisyRows.__dataclass_fields__:
        wanted = PartitionSpec(BATCH_AXES) if name == "left_out" else split
        assert getattr(rows, name).sharding.spec == wanted, name


@pytest.mark.parametrize(
    "policy", [GroupPolicy(3, "aligned", 3.0), GroupPolicy(3, density=3.0)], ids=["aligned", "random"]
)
def test_rows_see_the_document_before_their_group_and_nothing_else(policy: GroupPolicy) -> None:
    """One row of three documents, the second of two turns, and padding; a copy with another token at each place."""
    length, vocab = 30, 6
    segments = np.repeat([1, 2, 3, 0], [9, 12, 6, 3])[None]
    learnt = np.array([[0] * 3 + [1] * 6 + [0] * 2 + [1] * 4 + [0] * 2 + [1] * 4 + [1] * 6 + [0] * 3], bool)
    tokens = np.random.default_rng(0).integers(0, vocab - 1, (1, length))
    rows = draw_groups(batch_of(tokens, learnt, segments), policy, vocab - 1, KEY)
    copies = np.repeat(tokens, length + 1, axis=0)
    copies[np.arange(length), np.arange(length)] = (tokens[0] + 1) % (vocab - 1)
    batch = batch_of(copies, np.repeat(learnt, length + 1, axis=0), np.repeat(segments, length + 1, axis=0))
    everywhere = jax.tree.map(lambda array: jnp.repeat(array, length + 1, axis=0), rows)
    logits = np.asarray(streams(tiny_builder(), tiny_params(), batch, everywhere, 3)[1])

    moved = np.abs(logits[:-1] - logits[-1]).max(axis=-1)
    target = np.asarray(rows.is_target)[0]
    assert target.sum() >= 12 and len(set(np.asarray(rows.key_end)[0][target])) >= 6
    for r in np.flatnonzero(target):
        start, document = int(rows.key_end[0, r]), segments[0, int(rows.clean_row[0, r])]
        seen = (np.arange(length) < start) & (segments[0] == document)
        assert (moved[seen, r] > 1e-5).all()
        assert (moved[~seen, r] <= 1e-6).all()


def test_rows_of_padding_are_harmless() -> None:
    batch = random_batch(2, LENGTH, 5)
    padded = jax.tree.map(lambda array: jnp.pad(array, ((0, 1), (0, 0))), batch)
    rows, more = (draw_groups(one, GroupPolicy(3, "aligned"), 5, KEY) for one in (batch, padded))
    assert not np.asarray(more.is_target)[2].any() and more.left_out[2] == 0
    clean, noisy = streams(tiny_builder(), tiny_params(), batch, rows, 3)
    padded_clean, padded_noisy = streams(tiny_builder(), tiny_params(), padded, more, 3)
    np.testing.assert_allclose(padded_clean[:2], clean, atol=1e-5)
    np.testing.assert_allclose(padded_noisy[:2], noisy, atol=1e-5)
    assert np.isfinite(padded_clean).all() and np.isfinite(padded_noisy).all()
