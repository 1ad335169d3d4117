"""The decoding window: the worked example of method.md 3.5, and the rules of who stands where and sees whom."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_jax.backbone.qwen3 import Attend
from idlm_jax.config import ModelConfig
from idlm_jax.decoding.generate import SamplingParams, emissions, start
from idlm_jax.decoding.step import decode_round
from idlm_jax.decoding.window import LAYOUTS, build_window, window_rows
from tests.decoding.helpers import make_policy
from tests.decoding.support import tiny_config, tiny_model

# One letter a token: the worked example's text, its one wrong draft g (the text has G there; the example calls it g'),
# a filler and the mask.
ALPHABET = "ABCDEFGHIJg....M"
TEXT = "ABCDEFGHIJ" + "." * 32
MASK = ALPHABET.index("M")
SLOTS, PROMPT_LENGTH = 32, 6  # PROMPT_LENGTH: the example's L0; A is not counted

_build = jax.jit(build_window, static_argnums=(0, 1, 2))


def spelled(tokens: Iterable[int]) -> str:
    return "".join(ALPHABET[int(token)] for token in tokens)


@dataclass
class ScriptedModel:
    """Says what the worked example says, and writes down the windows it is fed.

    Clean rows say the next letter of the text; mask rows say the same but for one wrong draft. All attention scores are
    equal and the values of slot s are the unit vector e_s, so that attention shows which slots a row sees.
    """

    config: ModelConfig
    # For every window: its letters, its positions, (row, slot) that a row sees, the first row of the adapter.
    fed: list[str] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    seen: list[np.ndarray] = field(default_factory=list)
    gates: list[int] = field(default_factory=list)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend, states: tuple, adapter_from: int):
        rows = tokens.shape[1]
        slots = int(positions[0, 0]) + np.arange(rows)
        zeros = jnp.zeros((1, rows, 1, SLOTS))
        out, state = attend(zeros, zeros, jnp.eye(SLOTS)[slots][None, :, None], states[0])
        self.fed.append(spelled(tokens[0]))
        self.positions.append(np.asarray(positions[0]))
        self.seen.append(np.asarray(out[0, :, 0] > 0))
        self.gates.append(adapter_from)
        following = [TEXT[position + 1 - PROMPT_LENGTH] for position in np.asarray(positions[0])]
        said = [
            "g" if fed == "M" and right == "G" else right for fed, right in zip(self.fed[-1], following, strict=True)
        ]
        hidden = jax.nn.one_hot(jnp.asarray([ALPHABET.index(letter) for letter in said]), len(ALPHABET))
        return hidden[None], (state,)

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden


@dataclass
class Run:
    model: ScriptedModel
    # After each round: tokens emitted, and committed beyond the prompt.
    emitted: list[int]
    committed: list[int]
    text: str


@cache
def worked_example(layout: str, rounds: int = 5) -> Run:
    config = tiny_config(vocab_size=len(ALPHABET))
    prompt = [ALPHABET.index(letter) for letter in "." * PROMPT_LENGTH + "A"]
    policy = make_policy(3, layout)
    state = start(tiny_model(config), [prompt], [SamplingParams(max_tokens=20)], policy)
    # Every slot starts with its unit vector: a row that reads stale slots gives itself away.
    state = replace(state, cache=((jnp.zeros((1, 1, SLOTS, SLOTS)), jnp.eye(SLOTS)[None, None]),))
    run = Run(ScriptedModel(config), [], [], "")
    for _ in range(rounds):
        state = decode_round(run.model, state, policy)
        run.emitted.append(int(state.emitted[0]))
        run.committed.append(int(state.length[0]) - PROMPT_LENGTH)
    run.text = spelled(emissions(state, 1)[0].tokens)
    return run


def test_standard_rounds_are_those_of_the_worked_example() -> None:
    run = worked_example("standard")
    fed = run.model.fed
    assert (fed[1], fed[2], fed[4]) == ("BCDMM", "EFgMM", "HIJMM")
    # Cold rounds hold two dead draft rows between the clean row and the masks.
    assert [window[0] + window[3:] for window in (fed[0], fed[3])] == ["AMM", "GMM"]
    assert run.text == "BCDEFGHIJ."
    assert run.emitted == [1, 4, 6, 7, 10]
    assert run.committed == [1, 4, 6, 7, 10]


def test_standard_verifying_rounds_are_causal_over_consecutive_positions() -> None:
    run = worked_example("standard")
    for step, committed in ((1, 1), (2, 4), (4, 7)):
        first = PROMPT_LENGTH + committed
        assert run.model.positions[step].tolist() == list(range(first, first + 5))
        np.testing.assert_array_equal(run.model.seen[step], np.tril(np.ones((5, SLOTS), bool), first))


def test_standard_cold_rounds_are_causal_once_the_dead_rows_are_taken_out() -> None:
    run = worked_example("standard")
    live = [0, 3, 4]
    for step, committed in ((0, 0), (3, 6)):
        first = PROMPT_LENGTH + committed
        assert run.model.positions[step][live].tolist() == [first, first + 1, first + 2]
        slots = [*range(first), *(first + row for row in live)]
        seen = run.model.seen[step][live]
        np.testing.assert_array_equal(seen[:, slots], np.tril(np.ones((3, first + 3), bool), first))
        assert seen.sum() == seen[:, slots].sum()


def test_branch_rounds_never_fall_cold() -> None:
    run = worked_example("branch", rounds=4)
    assert [window[:3] for window in run.model.fed[1:]] == ["BCD", "EFg", "GHI"]
    assert run.emitted == run.committed == [1, 4, 6, 9]
    assert run.text == "BCDEFGHIJ"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_adapter_acts_on_all_mask_rows_and_no_other(layout: str) -> None:
    model = worked_example(layout).model
    assert set(model.gates) == {3}
    assert all(set(window[3:]) == {"M"} and "M" not in window[:3] for window in model.fed[1:])


def test_the_verifying_window_of_the_worked_example_built_directly() -> None:
    pending, drafts = jnp.asarray([ALPHABET.index("E")]), jnp.asarray([[ALPHABET.index(letter) for letter in "Fg"]])
    window = build_window(LAYOUTS["standard"], 3, MASK, jnp.asarray([9]), pending, drafts, jnp.asarray([True]))
    assert spelled(window.tokens[0]) == "EFgMM"
    assert window.positions.tolist() == [[9, 10, 11, 12, 13]]
    np.testing.assert_array_equal(window.mask[0], np.tril(np.ones((5, 5), bool)))


BATCH = 3


@st.composite
def windows(draw: st.DrawFn) -> tuple[int, str, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(stride, layout, length, pending, drafts, warm) of three requests."""
    stride = draw(st.integers(1, 16))
    integers = partial(st.integers, 0)
    return (
        stride,
        draw(st.sampled_from(sorted(LAYOUTS))),
        np.array(draw(st.lists(integers(40_000), min_size=BATCH, max_size=BATCH)), np.int32),
        np.array(draw(st.lists(integers(MASK), min_size=BATCH, max_size=BATCH)), np.int32),
        np.array(draw(st.lists(integers(MASK), min_size=BATCH * 15, max_size=BATCH * 15)), np.int32).reshape(BATCH, 15)[
            :, : stride - 1
        ],
        np.array(draw(st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))),
    )


def naive_rows(stride: int, layout: str, warm: bool) -> list[tuple[int, int, int]]:
    """(group, number, anchor) of every row by the definition of design.md 7; clean rows are of group -1."""
    anchors = list(range(stride)) if layout == "branch" else [stride - 1 if warm else 0]
    rows = [(-1, row, row) for row in range(stride)]
    return rows + [(group, j, anchor) for group, anchor in enumerate(anchors) for j in range(stride - 1)]


@given(windows())
@settings(deadline=None, max_examples=80)
def test_every_row_stands_and_sees_as_the_definition_says(case: tuple) -> None:
    stride, layout, length, pending, drafts, warm = case
    window = jax.device_get(_build(LAYOUTS[layout], stride, MASK, length, pending, drafts, warm))
    for b in range(BATCH):
        rows = naive_rows(stride, layout, bool(warm[b]))
        assert window.tokens[b].tolist() == [pending[b], *drafts[b], *[MASK] * (len(rows) - stride)]
        positions = [number if group < 0 else anchor + 1 + number for group, number, anchor in rows]
        assert (window.positions[b] - length[b]).tolist() == positions
        for r, (group, number, anchor) in enumerate(rows):
            for key, (key_group, key_number, _) in enumerate(rows):
                sees = key_number <= anchor if key_group < 0 else key_group == group and key_number <= number
                assert window.mask[b, r, key] == sees, (r, key)


@given(windows())
@settings(deadline=None, max_examples=80)
def test_clean_rows_never_see_masks_and_every_row_sees_itself(case: tuple) -> None:
    stride, layout, length, pending, drafts, warm = case
    mask = np.asarray(_build(LAYOUTS[layout], stride, MASK, length, pending, drafts, warm).mask)
    assert not mask[:, :stride, stride:].any()
    assert mask[:, np.arange(mask.shape[1]), np.arange(mask.shape[1])].all()
    # Nobody sees a row that stands after it in row order: slots of later rounds' rows are never needed.
    assert not np.triu(mask, 1).any()


@pytest.mark.parametrize("stride", range(1, 17))
def test_a_window_has_two_n_minus_one_or_n_squared_rows(stride: int) -> None:
    assert window_rows(LAYOUTS["standard"], stride) == 2 * stride - 1
    assert window_rows(LAYOUTS["branch"], stride) == stride**2


@pytest.mark.parametrize("stride", [2, 3, 8])
def test_drafts_that_survive_stand_right_after_the_next_pending_token(stride: int) -> None:
    """The one rule that ties ``anchors``, ``surviving_group`` and ``next_warm`` together."""
    for layout in LAYOUTS.values():
        for warm in (False, True):
            for accepted in range(stride if warm else 1):
                warm_B, accepted_B = jnp.asarray([warm]), jnp.asarray([accepted])
                group = int(layout.surviving_group(accepted_B)[0])
                first_mask = int(layout.anchors(warm_B, stride)[0, group]) + 1  # position - length
                next_pending = accepted + 1
                # A mask at position t drafts token t + 1.
                assert bool(layout.next_warm(warm_B, accepted_B, stride)[0]) == (first_mask == next_pending)
