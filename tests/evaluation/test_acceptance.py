"""Measured acceptance against dense forwards and sums written out, against simulation, and against real decoding."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.checkpoint.hf import write_hf
from idlm_jax.checkpoint.open import open_source
from idlm_jax.data.tokens import TokenStoreWriter, tokenizer_hash
from idlm_jax.decoding.generate import SamplingParams, generate_tokens, stats_from_history
from idlm_jax.errors import UserError
from idlm_jax.evaluation.acceptance import Acceptance, AcceptanceReport, evaluate_store, measure
from idlm_jax.training.groups import Batch
from idlm_jax.training.params import ModelBuilder, flat_adapter, flat_base
from pallas_kernels.decode_attention.reference import window_attention
from tests.cli.decoding_support import TINY, TOKENIZER
from tests.decoding.helpers import MASK, drafting_adapter, drafting_config, drafting_model, drafting_params, make_policy
from tests.decoding.support import tiny_config, tiny_model
from tests.training.support import TRAINING, batch_of, compiled, tiny_builder, tiny_params

# A token a digit, 1 where it is learnt. The rows have room for all of the 8 and 7 groups that can be drawn.
DOCUMENTS = [["000111110", "0011100111"], ["0000000001111111", "00110000"]]
LENGTH, BLOCK, TEMPERATURES = 24, 3, (1.0, 0.7)
VOCAB = 12


def rows_of(documents: list[list[str]]) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """The (tokens, loss mask) of every document."""
    rng = np.random.default_rng(2)
    return [
        [(rng.integers(0, VOCAB - 1, len(digits)), np.array([digit == "1" for digit in digits])) for digits in row]
        for row in documents
    ]


def packed(rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> Batch:
    tokens, learnt, segments = (np.zeros((len(rows), LENGTH), int) for _ in range(3))
    for row, documents in enumerate(rows):
        at = 0
        for number, (ids, mask) in enumerate(documents):
            where = slice(at, at + len(ids))
            tokens[row, where], learnt[row, where], segments[row, where] = ids, mask, number + 1
            at += len(ids)
    return batch_of(tokens, learnt, segments)


def dense_logits(model: Qwen3, tokens: np.ndarray, starts: np.ndarray, adapter_from: int | None) -> np.ndarray:
    """Of documents (padded to 16 tokens), each followed by the masks that begin at ``starts``."""
    size = tokens.shape[1]
    row, column = np.arange(size + BLOCK)[:, None], np.arange(size + BLOCK)
    visible = np.where(
        row < size, column <= row, (column < starts[:, None, None]) | ((column >= size) & (column <= row))
    )
    positions = np.where(column < size, column, starts[:, None] + column - size)
    with_masks = np.concatenate([tokens, np.full((len(tokens), BLOCK), VOCAB - 1)], axis=1)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, state: None) -> tuple[jax.Array, None]:
        nothing = jnp.zeros(len(tokens), jnp.int32)
        return window_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), nothing, jnp.asarray(visible)), state

    @compiled
    def run(model: Qwen3) -> jax.Array:
        return model.logits(model(jnp.asarray(with_masks), jnp.asarray(positions), attend, None, adapter_from)[0])

    return np.asarray(run(model), np.float64)


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Without the mask token."""
    weights = np.exp(logits[..., : VOCAB - 1] / temperature)
    return weights / weights.sum(axis=-1, keepdims=True)


def naive_acceptance(p: np.ndarray, q: np.ndarray, temperature: float) -> float:
    """Of one draft; at temperature 0, whether the two agree."""
    if temperature == 0:
        return float(p[: VOCAB - 1].argmax() == q[: VOCAB - 1].argmax())
    return float(np.minimum(probabilities(p, temperature), probabilities(q, temperature)).sum())


def naive_report(model: Qwen3, adapter: bool, gated: bool) -> dict[str, list]:
    """Everything that is measured, one group after another."""
    documents = [document for row in rows_of(DOCUMENTS) for document in row]
    groups = [
        (tokens, learnt, start)
        for tokens, learnt in documents
        for start in range(1, len(tokens) - 1)
        if learnt[start] and learnt[start + 1]
    ]
    assert len(groups) == 15
    padded = np.array([np.pad(tokens, (0, 16 - len(tokens))) for tokens, _, _ in groups])
    starts = np.array([start for _, _, start in groups])
    logits = dense_logits(model, padded, starts, None if not adapter else 16 if gated else 0)
    report: dict[str, list] = {"by_depth": [], "prefix": []}
    for temperature in (*TEMPERATURES, 0.0):
        depths, prefixes = ([[] for _ in range(BLOCK)] for _ in range(2))
        for g, (tokens, learnt, start) in enumerate(groups):
            together = 1.0
            for depth in range(BLOCK):
                at = start + depth
                if at + 1 >= len(tokens) or not (learnt[at] and learnt[at + 1]):
                    break
                accepted = naive_acceptance(logits[g, at], logits[g, 16 + depth], temperature)
                together *= accepted
                depths[depth].append(accepted)
                prefixes[depth].append(together)
        report["by_depth"].append([np.mean(values) for values in depths])
        report["prefix"].append([np.mean(values) for values in prefixes])
    report["rows"] = [sum(map(len, depths))]
    # Clean loss, mask token included: of every learnt token that follows another.
    loss, first = [], {id(tokens): g for g, (tokens, _, _) in reversed(list(enumerate(groups)))}
    for tokens, learnt in documents:
        log_p = logits[first[id(tokens)]]
        log_p = log_p - np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
        loss += [-log_p[i - 1, tokens[i]] for i in range(1, len(tokens)) if learnt[i]]
    report["loss"] = loss
    return report


@pytest.mark.parametrize(("adapter", "gated"), [(False, True), (True, True), (True, False)])
def test_acceptance_is_that_of_dense_forwards_of_every_group(adapter: bool, gated: bool) -> None:
    config = tiny_config(VOCAB)
    model = tiny_model(config, adapter)
    wanted = naive_report(model, adapter, gated)
    builder, params = tiny_builder(adapter, VOCAB), tiny_params(adapter, VOCAB)
    batch = packed(rows_of(DOCUMENTS))
    report = measure(builder, params, [batch], BLOCK, gated=gated, temperatures=TEMPERATURES)
    assert [row.temperature for row in report.temperatures] == [1.0, 0.7, 0.0]
    for i, row in enumerate(report.temperatures):
        np.testing.assert_allclose(row.by_depth, wanted["by_depth"][i], atol=2e-5)
        np.testing.assert_allclose(row.prefix, wanted["prefix"][i], atol=2e-5)
    assert report.rows == wanted["rows"][0] and report.tokens == len(wanted["loss"])
    assert report.clean_loss == pytest.approx(np.mean(wanted["loss"]), rel=1e-5)
    assert report.perplexity == pytest.approx(np.exp(np.mean(wanted["loss"])), rel=1e-5)
    # Greedy agreement of a random model is rare; a constant would not do.
    assert len({value for row in report.temperatures for value in row.by_depth}) > 6


def test_batches_are_pooled_row_by_row() -> None:
    builder, params = tiny_builder(vocab_size=VOCAB), tiny_params(vocab_size=VOCAB)
    rows = rows_of(DOCUMENTS)
    together = measure(builder, params, [packed(rows)], BLOCK)
    apart = measure(builder, params, [packed([row]) for row in rows], BLOCK)
    assert (apart.rows, apart.tokens) == (together.rows, together.tokens)
    assert apart.clean_loss == pytest.approx(together.clean_loss, rel=1e-5)
    for one, other in zip(apart.temperatures, together.temperatures, strict=True):
        np.testing.assert_allclose(one.prefix, other.prefix, atol=1e-5)


def test_what_the_model_says_of_the_mask_token_does_not_count() -> None:
    """The decoder never emits it; perplexity is the model's own."""
    builder, params = tiny_builder(vocab_size=VOCAB), tiny_params(vocab_size=VOCAB)
    batch = packed(rows_of(DOCUMENTS))
    loud = {**params, "lm_head.kernel": params["lm_head.kernel"].at[:, VOCAB - 1].multiply(10)}
    plain, other = (measure(builder, weights, [batch], BLOCK) for weights in (params, loud))
    assert other.clean_loss > plain.clean_loss + 0.1
    for one, same in zip(plain.temperatures, other.temperatures, strict=True):
        np.testing.assert_allclose(one.prefix, same.prefix, atol=1e-6)


def test_text_without_anything_to_draft_is_refused() -> None:
    batch = packed([[(np.zeros(9, int), np.arange(9) % 2 == 0)]])
    with pytest.raises(UserError, match="nothing to measure acceptance on"):
        measure(tiny_builder(vocab_size=VOCAB), tiny_params(vocab_size=VOCAB), [batch], BLOCK)
    with pytest.raises(UserError, match="nothing to measure acceptance on"):
        measure(tiny_builder(vocab_size=VOCAB), {}, [], BLOCK)


# Tokens a forward.


def simulated(chances: np.ndarray, layout: str, rounds: int = 200_000) -> float:
    """Tokens a forward of a decoder whose draft at depth k, all before it accepted, is accepted with ``chances[k]``."""
    rng = np.random.default_rng(0)
    accepted = np.cumprod(rng.random((rounds, len(chances))) < chances, axis=1).sum(axis=1)
    forwards = tokens = 0
    for count in accepted:
        # After a rejection the standard layout has no drafts: a round that emits one token.
        cold = layout == "standard" and count < len(chances)
        tokens, forwards = tokens + count + 1 + cold, forwards + 1 + cold
    return tokens / forwards


@pytest.mark.parametrize("layout", ["standard", "branch"])
@pytest.mark.parametrize("chances", [[0.6], [0.9, 0.5], [0.7, 0.8, 0.9]], ids=lambda chances: str(len(chances) + 1))
def test_tokens_a_forward_are_those_of_a_simulated_decoder(chances: list[float], layout: str) -> None:
    prefix = np.cumprod(chances)
    # Deeper drafts than the stride has do not matter.
    acceptance = Acceptance(1.0, (), (*prefix, 0.123))
    tpf = acceptance.tokens_per_forward(len(chances) + 1, layout)
    assert tpf == pytest.approx(simulated(np.array(chances), layout), abs=0.01)


def test_tokens_a_forward_are_those_of_the_table() -> None:
    """method.md 6.2."""
    strides = (2, 3, 4, 5, 8)
    for p, row in ((0.5, (1.33, 1.43, 1.47, 1.48, 1.50)), (0.9, (1.82, 2.44, 2.92, 3.30, 4.09))):
        acceptance = Acceptance(1.0, (p,) * 7, tuple(p**k for k in range(1, 8)))
        assert [round(acceptance.tokens_per_forward(stride, "standard"), 2) for stride in strides] == list(row)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_tokens_a_forward_lie_between_one_and_the_stride(p: float) -> None:
    acceptance = Acceptance(1.0, (p,) * 3, (p,) * 3)
    for layout in ("standard", "branch"):
        assert [acceptance.tokens_per_forward(n, layout) for n in (2, 3, 4)] == ([2, 3, 4] if p else [1, 1, 1])


# Real decoding.


@cache
def self_sampled(layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """64 texts sampled by ISD, the share of verifying rounds that accepted the first k drafts, and its error."""
    requests, prompt, length, stride = 64, 8, 128, 4
    prompts = np.random.default_rng(0).integers(0, MASK, (requests, prompt)).tolist()
    sampling = [SamplingParams(1.0, seed=i, max_tokens=length, ignore_eos=True) for i in range(requests)]
    model = drafting_model(drafting_adapter())
    answers = generate_tokens(model, prompts, sampling, make_policy(stride, layout, "ratio"))
    each = [stats_from_history(answer.history, length, stride) for answer in answers]
    verifying = sum(one.forwards - one.cold_rounds for one in each)
    share = np.sum([one.accepted for one in each], axis=0) / verifying
    texts = np.array([[*prompt, *answer.tokens] for prompt, answer in zip(prompts, answers, strict=True)])
    return texts, share, np.sqrt(share * (1 - share) / verifying)


@pytest.mark.parametrize("layout", ["standard", "branch"])
def test_measured_acceptance_is_that_of_real_decoding_on_its_own_text(layout: str) -> None:
    """Within sampling error and 0.02: rounds begin a little more often where drafts are rejected than groups do."""
    texts, share, error = self_sampled(layout)
    learnt = np.ones_like(texts, bool)
    learnt[:, :8] = False
    adapter = drafting_adapter()
    params = {**flat_base(drafting_params()), **flat_adapter(adapter.params)}
    builder = ModelBuilder(drafting_config(), adapter.config, "float32")
    report = measure(builder, params, [batch_of(texts, learnt)] * 2, 3, temperatures=(1.0, 2.0))
    measured, hotter = (np.array(report.temperatures[i].prefix) for i in range(2))
    tolerance = 3 * error + 0.02
    assert (np.abs(measured - share) < tolerance).all()
    # At another temperature it is not.
    assert (np.abs(hotter - share) > tolerance).all()


# Stores.

LLAMA = TINY.with_name("llama_f32.gguf")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Documents of 20 tokens, four of which are a prompt, for the tiny GGUF model."""
    target, rng = tmp_path / "store", np.random.default_rng(0)
    with TokenStoreWriter(target, vocab_size=280, tokenizer_hash=tokenizer_hash(TOKENIZER), settings={}) as writer:
        for _ in range(6):
            writer.append(rng.integers(3, 270, 20), np.arange(20) >= 4)
        writer.finish({})
    return target


def evaluate(store: Path, **changes: object) -> tuple[AcceptanceReport, AcceptanceReport | None]:
    settings = {"mask_token": "270", "length": 40, "batch_size": 2, "dtype": "float32", "documents": 0}
    return evaluate_store(str(TINY), str(store), **{**settings, **changes})  # type: ignore


def test_all_or_some_documents_of_a_store_are_measured(store: Path) -> None:
    report, none = evaluate(store)
    assert none is None and report.tokens == 6 * 16
    # Two documents a row, with room for 16 groups of up to three drafts.
    assert 3 * 16 < report.rows <= 3 * 16 * 3
    some, _ = evaluate(store, documents=2)
    assert some.tokens == 2 * 16 and some.clean_loss != report.clean_loss
    assert evaluate(store, documents=2)[0] == some
    assert evaluate(store, documents=2, seed=1)[0] != some


def test_a_base_is_measured_beside_the_model(store: Path) -> None:
    report, base = evaluate(store, base=str(TINY))
    assert base is not None and base.perplexity == report.perplexity


def test_an_adapter_brings_its_mask_token_and_leaves_the_text_alone_if_gated(store: Path) -> None:
    adapter = str(TRAINING / "adapter")
    (without, _), (gated, _) = evaluate(store), evaluate(store, adapter=adapter, mask_token=None)
    ungated, _ = evaluate(store, adapter=adapter, mask_token=None, gated=False)
    assert gated.perplexity == pytest.approx(without.perplexity, rel=1e-6)
    assert ungated.perplexity != pytest.approx(without.perplexity, rel=1e-3)
    assert len({report.temperatures for report in (without, gated, ungated)}) == 3


def test_a_base_of_another_family_has_its_own_perplexity(store: Path, tmp_path: Path) -> None:
    """The same tokenizer, other heads and norms: the other model's config would misread its weights."""
    base = tmp_path / "llama"
    write_hf(open_source(LLAMA), base)
    TOKENIZER.save_pretrained(base)
    _, beside = evaluate(store, base=str(base))
    alone, _ = evaluate_store(
        str(base), str(store), mask_token="270", length=40, batch_size=2, dtype="float32", documents=0
    )
    assert beside is not None and beside.perplexity == alone.perplexity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 0}, "block_size must be in 1 … 15, not 0"),
        ({"block_size": 16}, "block_size must be in 1 … 15, not 16"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"documents": -1}, "documents must be 0 (all of them) or more, not -1"),
        ({"temperatures": (1.0, 0.0)}, "temperature must be positive (greedy is always measured), not 0.0"),
        ({"temperatures": (float("nan"),)}, "temperature must be positive"),
        ({"dtype": "float23"}, "unknown dtype 'float23' (one of bfloat16, float32); did you mean 'float32'?"),
        ({"seed": -1}, "seed must be in [0, 2^32), not -1"),
        ({"length": 129}, "length 129 exceeds the context of 128"),
        ({"length": 19}, "a document of 20 tokens does not fit a row of 19"),
        ({"mask_token": None}, "names no mask token to draft with: give --mask-token"),
        ({"mask_token": "999"}, "mask token id 999 is outside the vocabulary"),
        ({"base": "nowhere/nothing/here"}, "nowhere/nothing/here"),
        ({"adapter": "nowhere/nothing/here"}, "nowhere/nothing/here"),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else "",
)
def test_what_cannot_be_measured_is_one_line(store: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        evaluate(store, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_text_of_another_tokenizer_is_refused(store: Path) -> None:
    with pytest.raises(UserError, match="was made with the tokenizer of another model"):
        evaluate_store(str(LLAMA), str(store), mask_token="270", length=40)
    with pytest.raises(UserError, match="was made with the tokenizer of another model"):
        evaluate(store, base=str(LLAMA))
