"""The report of docs/equivalence.md in small: our texts follow the distribution that PyTorch sampled from.

``tests/golden/equivalence.npz`` holds PyTorch's texts of a tiny model (``scripts/make_golden.py``). The same tests, at
the same number of texts, must find that the official rule (method.md 3.7) writes something else.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.checkpoint.peft import load_adapter
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.decoding.sampling import COUPLINGS
from idlm_jax.decoding.step import DecodeState, Policy
from idlm_jax.decoding.window import LAYOUTS
from idlm_jax.evaluation.equivalence import draw, drawn_texts, layer_outputs, prefill_copies, window_logits
from idlm_jax.evaluation.two_samples import DrawComparison, compare_draws, compare_texts, holm
from tests.decoding.support import OfficialCoupling
from tests.support import GOLDEN, relative_error

MASK = 95
THEIRS = dict(np.load(GOLDEN / "equivalence.npz"))
PROMPTS = [[int(token) for token in row if token != MASK] for row in THEIRS["prompts"]]
# Texts after every prompt, decoded at once: as many prompts fill a batch of a power of two.
COPIES, BATCHES = 64, 8
ALPHA = 0.01

WAYS = {
    f"{layout}-{coupling}": Policy(4, LAYOUTS[layout], COUPLINGS[coupling])
    for layout in LAYOUTS
    for coupling in COUPLINGS
}
OFFICIAL = Policy(4, LAYOUTS["standard"], OfficialCoupling())


@cache
def model() -> Qwen3:
    source = open_source(GOLDEN / "qwen3_tied")
    adapter = load_adapter(GOLDEN / "peft_r8", source.config).astype(jnp.float32)
    return Qwen3(source.config.replace(mask_token_id=MASK), load_params(source, jnp.dtype("float32")), adapter)


@cache
def prefilled(policy: Policy, greedy: bool = False) -> DecodeState:
    room = THEIRS["texts"].shape[2]
    sampling = [
        SamplingParams(0.0 if greedy else float(t), int(k), float(p), max_tokens=room, ignore_eos=True)
        for t, k, p in THEIRS["settings"]
    ]
    return prefill_copies(model(), PROMPTS, sampling, policy, COPIES)


def sampled(policy: Policy, seed: int, tokens: int) -> DecodeState:
    """Texts by the decoder itself; all draws of a policy run the same compiled program."""
    return draw(model(), prefilled(policy), seed * 2**20, policy, tokens)


def per_prompt(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(PROMPTS), COPIES, *values.shape[1:])


@cache
def draws(policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """Short texts after every prompt, and the drafts accepted in the first round that had any."""
    tokens = THEIRS["draws"].shape[2]
    states = [sampled(policy, seed, tokens) for seed in range(BATCHES)]
    texts = [per_prompt(drawn_texts(state, tokens)) for state in states]
    accepted = [per_prompt(np.asarray(state.history[:, 1])) for state in states]
    return np.concatenate(texts, axis=1), np.concatenate(accepted, axis=1)


def corrected(comparisons: list[DrawComparison]) -> float:
    """The smallest p-value of all tests, corrected for their number."""
    return float(holm([outcome.p for each in comparisons for outcome in each.outcomes]).min())


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("way", WAYS)
def test_draws_follow_the_distribution_of_pytorchs(way: str) -> None:
    assert corrected(compare_draws(draws(WAYS[way])[0], THEIRS["draws"].astype(np.int32), rng())) > ALPHA


def test_the_same_test_of_draws_detects_the_official_rule() -> None:
    views = {each.view: each for each in compare_draws(draws(OFFICIAL)[0], THEIRS["draws"].astype(np.int32), rng())}
    assert corrected(list(views.values())) < 1e-12
    # The first token comes from a cold round, before any draft: the rule cannot harm it.
    assert corrected([views["token 1"]]) > ALPHA
    assert views["token 2"].all_total_variation.p < 1e-9


@pytest.mark.parametrize("way", ["standard-ratio", "branch-ratio"])
def test_drafts_are_accepted_as_often_as_by_pytorchs_isd(way: str) -> None:
    accepted = draws(WAYS[way])[1]
    theirs = THEIRS["isd_accepted"].astype(np.int32)
    assert 0.1 < accepted.mean() < 2.9
    assert corrected(compare_draws(accepted[:, :, None], theirs[:, :, None], rng())) > ALPHA


_causal_logits = jax.jit(causal_logits)


def _surprisal(texts: np.ndarray) -> np.ndarray:
    """Mean −log p of each text under the base model."""
    count, length = texts.shape[1:]
    rows = [[*prompt, *text] for prompt, some in zip(PROMPTS, texts, strict=True) for text in some.tolist()]
    padded = jnp.asarray([row + [0] * (max(map(len, PROMPTS)) + length - len(row)) for row in rows])
    log_p = jax.nn.log_softmax(_causal_logits(model(), padded)[:, :-1])
    each = np.asarray(jnp.take_along_axis(log_p, padded[:, 1:, None], axis=2))[:, :, 0]
    ends = [len(row) - 1 for row in rows]
    return np.array([-row[end - length : end].mean() for row, end in zip(each, ends, strict=True)]).reshape(-1, count)


def _texts_p(policy: Policy) -> float:
    theirs = THEIRS["texts"].astype(np.int32)
    count, tokens = theirs.shape[1:]
    ours = per_prompt(drawn_texts(sampled(policy, 100, tokens), tokens))[:, :count]
    tests = compare_texts(ours, theirs, (_surprisal(ours), _surprisal(theirs)), rng())
    assert {"mmd", "surprisal", "entropy", "3-grams"} <= set(tests)
    return float(holm([outcome.p for outcome in tests.values()]).min())


@pytest.mark.parametrize("way", ["standard-ratio", "branch-gumbel"])
def test_long_texts_follow_the_distribution_of_pytorchs(way: str) -> None:
    assert _texts_p(WAYS[way]) > ALPHA


def test_the_same_test_of_long_texts_detects_the_official_rule() -> None:
    assert _texts_p(OFFICIAL) < 1e-6


@pytest.mark.parametrize("way", ["standard-gumbel", "branch-gumbel"])
def test_greedy_texts_are_those_of_pytorch(way: str) -> None:
    policy, tokens = WAYS[way], THEIRS["greedy"].shape[1]
    texts = drawn_texts(draw(model(), prefilled(policy, greedy=True), 0, policy, tokens), tokens)
    assert np.array_equal(per_prompt(texts)[:, 0], THEIRS["greedy"])


def test_rows_of_decoding_windows_are_pytorchs_causal_rows_and_its_gated_mask_rows() -> None:
    sequence = THEIRS["sequence"][None].astype(np.int32)
    clean, masks = window_logits(model(), sequence, WAYS["branch-gumbel"])
    assert relative_error(clean[0], THEIRS["clean_logits"]) < 1e-4
    assert relative_error(masks[0], THEIRS["draft_logits"]) < 1e-4
    clean, masks = window_logits(model(), sequence, WAYS["standard-gumbel"])
    assert relative_error(clean[0], THEIRS["clean_logits"]) < 1e-4
    last_of_each_window = THEIRS["draft_logits"].reshape(-1, 4, 3, masks.shape[2])[:, 3].reshape(masks[0].shape)
    assert relative_error(masks[0], last_of_each_window) < 1e-4


def test_the_last_layers_output_gives_the_logits() -> None:
    tokens = jnp.asarray(THEIRS["sequence"][None].astype(np.int32))
    outputs = layer_outputs(model(), tokens)
    assert outputs.shape[0] == model().config.num_hidden_layers
    assert relative_error(np.asarray(model().logits(model().norm(outputs[-1])))[0], THEIRS["clean_logits"]) < 1e-4


def test_draws_leave_the_prefilled_state_as_it_was_and_repeat_with_their_seeds() -> None:
    policy = WAYS["standard-gumbel"]
    first, again, other = (drawn_texts(sampled(policy, seed, 4), 4) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
