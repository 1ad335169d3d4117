"""The Python API on tiny models, and on SmolLM2 where its file is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax import DecodeConfig, Generation, LanguageModel, SamplingParams, UserError, load
from idlm_jax.backbone.adapter import AdapterConfig, init_adapter
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.weights import fuse_projections
from idlm_jax.checkpoint.fetch import MODELS
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.decoding.text import Piece
from idlm_jax.evaluation.equivalence import Comparison, compare, first_difference
from tests.support import GOLDEN

# All requests ask for the same number of tokens after a short prompt, to reuse compiled programs.
MOST = 32
PROMPTS = ["hello", "12 hello hello", "x"]
CHAT = [{"role": "user", "content": "hello"}]
WAYS = [(1, "branch"), (3, "branch"), (4, "branch"), (4, "standard")]
TINY = GOLDEN / "gguf" / "qwen3_f32.gguf"
SMOLLM2 = Path(__file__).parents[1] / "models" / MODELS["smollm2"].file_name


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    """A random two-layer model with a real tokenizer; sampled, its drafts are accepted about every other time."""
    return load(TINY, dtype="float32", mask_token=0)


def sampled(seed: int | None = 5, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=MOST, **changes)


def answer(model: LanguageModel, prompt: Any = "hello", sampling: Any = None, **how: Any) -> Generation:
    (generation,) = model.generate(prompt, sampling or sampled(), **how)
    return generation


def test_a_batch_of_unequal_prompts_gives_what_single_calls_give(tiny: LanguageModel) -> None:
    each = [sampled(1), SamplingParams(seed=2, max_tokens=MOST), sampled(3, top_p=0.9, ignore_eos=True)]
    together = tiny.generate(PROMPTS, each)
    alone = [answer(tiny, prompt, sampling) for prompt, sampling in zip(PROMPTS, each, strict=True)]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert [g.text for g in together] == [g.text for g in alone]
    assert [g.stats for g in together] == [g.stats for g in alone]
    assert [g.sampling for g in together] == each


def test_one_prompt_or_a_list_as_text_or_token_ids(tiny: LanguageModel) -> None:
    expected, ids = answer(tiny), tiny.tokenizer("hello").input_ids
    assert expected.prompt_tokens == len(ids)
    for prompt in (ids, tuple(ids), np.array(ids), [ids], [np.array(ids)], ["hello"]):
        assert answer(tiny, prompt).token_ids == expected.token_ids


def test_a_chat_is_encoded_as_its_rendered_template(tiny: LanguageModel) -> None:
    rendered = tiny.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert str(rendered).endswith("<|im_start|>assistant\n")
    assert tiny.encode(CHAT) == tiny.encode(str(rendered)) and tiny.tokenizer.decode(tiny.encode(CHAT)) == rendered


def test_as_chat_puts_the_system_message_first(tiny: LanguageModel) -> None:
    assert tiny.as_chat("a") == [{"role": "user", "content": "a"}]
    assert tiny.as_chat("a", "b") == [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}]


@pytest.mark.parametrize(("stride", "layout"), WAYS)
def test_stop_strings_cut_the_same_text_and_the_same_rounds_in_every_way(
    stride: int, layout: str, tiny: LanguageModel
) -> None:
    how = {"stride": stride, "layout": layout}
    reference, full = answer(tiny, stride=1), answer(tiny, **how)
    assert full.text == reference.text
    assert stride == 1 or full.stats.forwards < full.stats.tokens  # drafts were accepted, so stops fall inside rounds
    readable = [i for i in range(4, len(full.text) - 1) if "�" not in full.text[i : i + 2]]
    for at in readable[:: max(1, len(readable) // 6)]:
        stop = full.text[at : at + 2]
        cut = answer(tiny, sampling=sampled(stop=("never", stop)), **how)
        assert cut.text == reference.text[: reference.text.find(stop)]
        assert cut.finish_reason == "stop"
        assert cut.token_ids == reference.token_ids[: len(cut.token_ids)]
        # Rounds that ran on before the host saw the text are not counted.
        rounds = cut.stats.emitted_by_round
        assert sum(rounds) == cut.stats.tokens == len(cut.token_ids)
        assert cut.stats.forwards == len(rounds)
        assert rounds[:-1] == full.stats.emitted_by_round[: len(rounds) - 1]
        assert 0 < rounds[-1] <= full.stats.emitted_by_round[len(rounds) - 1]


def test_streamed_pieces_join_to_the_text_of_generate(tiny: LanguageModel) -> None:
    expected = answer(tiny)
    *pieces, last = tiny.stream("hello", sampled())
    assert isinstance(last, Generation) and last.token_ids == expected.token_ids
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == last.text == expected.text
    assert {piece.drafted for piece in pieces} == {True, False}


def test_a_seed_is_drawn_when_none_is_given_and_reproduces_the_text(tiny: LanguageModel) -> None:
    first, second = answer(tiny, sampling=sampled(None)), answer(tiny, sampling=sampled(None))
    assert first.sampling.seed != second.sampling.seed and first.token_ids != second.token_ids
    again = answer(tiny, sampling=first.sampling)
    assert (again.token_ids, again.stats) == (first.token_ids, first.stats)


def test_without_sampling_parameters_those_of_the_decode_settings_hold(
    tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("idlm_jax.model.Decoding", lambda *arguments: None)
    decode = DecodeConfig(temperature=1.0, top_k=50, top_p=0.95)
    (used,) = tiny.start(["x"], decode=decode).sampling
    assert (used.temperature, used.top_k, used.top_p) == (1.0, 50, 0.95)
    (used,) = tiny.start(["x"], SamplingParams(seed=3), decode).sampling
    assert used == SamplingParams(seed=3)


def test_a_generation_becomes_json_and_says_how_it_was_made(tiny: LanguageModel) -> None:
    generation = answer(tiny, layout="standard")
    data = json.loads(json.dumps(generation.to_dict()))
    assert (data["text"], data["token_ids"]) == (generation.text, generation.token_ids)
    assert (data["stride"], data["layout"], data["coupling"], data["gated"]) == (4, "standard", "gumbel", True)
    assert data["sampling"]["seed"] == 5
    stats = data["stats"]
    assert stats["tokens_per_forward"] == stats["tokens"] / stats["forwards"]
    assert len(stats["acceptance"]) == 3 and 0 < stats["cold_share"] < 1 and stats["seconds"] > 0


def test_comparison_with_ar_finds_no_difference(tiny: LanguageModel) -> None:
    ways = [DecodeConfig(layout="branch"), DecodeConfig(layout="standard")]
    (comparison,) = compare(tiny, ["hello"], sampled(None), ways)
    assert comparison.identical and comparison.must_agree and comparison.first_differences == (None, None)
    assert comparison.reference.decode.stride == 1
    assert [other.decode for other in comparison.candidates] == ways


def test_only_sampling_with_the_ratio_coupling_may_give_another_text(tiny: LanguageModel) -> None:
    greedy, sample = (answer(tiny, sampling=s) for s in (SamplingParams(max_tokens=MOST), sampled()))
    ratio = DecodeConfig(coupling="ratio")
    assert not Comparison(sample, (sample, replace(sample, decode=ratio))).must_agree
    assert Comparison(sample, (sample,)).must_agree and Comparison(greedy, (replace(greedy, decode=ratio),)).must_agree
    other = replace(sample, token_ids=[*sample.token_ids[:7], 279])
    assert Comparison(sample, (sample, other)).first_differences == (None, 7)
    assert not Comparison(sample, (sample, other)).identical


def test_first_difference_counts_a_missing_end_as_one() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == first_difference([1, 2, 3], [1, 2]) == 2


def test_an_adapter_changes_no_token_unless_it_acts_on_every_row(tiny: LanguageModel) -> None:
    adapter = init_adapter(tiny.config, AdapterConfig(rank=4, alpha=8), jax.random.key(1), jnp.float32, 0.5)
    params = fuse_projections(load_params(open_source(TINY)))
    adapted = LanguageModel(Qwen3(tiny.config, params, adapter), tiny.tokenizer, True)
    base, gated = answer(tiny), answer(adapted)
    assert gated.token_ids == base.token_ids
    assert gated.stats.accepted != base.stats.accepted  # it did act
    assert answer(adapted, gated=False).token_ids != base.token_ids


@pytest.mark.parametrize(
    ("prompts", "sampling", "how", "said"),
    [
        ([], None, {}, "no prompts"),
        ("", None, {}, "the prompt is empty"),
        (["a", ""], None, {}, "the prompt is empty"),
        ([3, 9999], None, {}, "outside the vocabulary of 280"),
        ([3, -1], None, {}, "outside the vocabulary of 280"),
        ("x", SamplingParams(max_tokens=128), {}, r"exceeds the model's context of 128"),
        (CHAT, SamplingParams(max_tokens=100), {}, r"exceeds the model's context"),
        ("x", SamplingParams(max_tokens=8), {"stride": 12}, r"window of 144 rows.*context is 128"),
        ("x", None, {"stride": 17}, "stride must be in 1 … 16"),
        ("x", None, {"stride": 0}, "stride must be in 1 … 16"),
        ("x", None, {"layout": "brunch"}, "did you mean 'branch'"),
        ("x", None, {"coupling": "gumble"}, "did you mean 'gumbel'"),
        ("x", SamplingParams(top_p=0.0), {}, r"top_p must be in \(0, 1\], not 0"),
        ("x", SamplingParams(top_p=float("nan")), {}, "top_p must be in"),
        ("x", SamplingParams(temperature=-0.1), {}, "temperature must be finite and not negative"),
        ("x", SamplingParams(temperature=float("nan")), {}, "temperature must be finite"),
        ("x", SamplingParams(temperature=float("inf")), {}, "temperature must be finite"),
        ("x", SamplingParams(top_k=-2), {}, "top_k must be positive"),
        ("x", SamplingParams(max_tokens=0), {}, "max_tokens must be at least 1"),
        ("x", SamplingParams(seed=-1), {}, "seed must be in"),
        ("x", SamplingParams(seed=2**32), {}, "seed must be in"),
        ("x", SamplingParams(stop=("a", "")), {}, "stop strings must not be empty"),
        (["a", "b"], [SamplingParams()], {}, "1 sampling parameters for 2 prompts"),
        (["a", "b"], [], {}, "0 sampling parameters for 2 prompts"),
    ],
)
def test_requests_that_cannot_run_are_user_errors(
    prompts: Any, sampling: Any, how: dict[str, Any], said: str, tiny: LanguageModel
) -> None:
    with pytest.raises(UserError, match=said):
        tiny.generate(prompts, sampling or ([] if sampling == [] else SamplingParams(max_tokens=8)), **how)


def test_without_a_mask_token_only_stride_1_decodes() -> None:
    model = load(TINY, dtype="float32")
    with pytest.raises(UserError, match="names no mask token"):
        model.generate("hello", sampled())
    assert model.generate("hello", sampled(), stride=1)[0].stats.tokens > 0


def test_chats_need_a_template_that_takes_them(tiny: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="refuses these messages: roles must alternate"):
        tiny.generate(CHAT)
    monkeypatch.setattr(tiny.tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        tiny.generate(CHAT)
    with pytest.raises(UserError, match="no place for a system message"):
        tiny.as_chat("a", "b")
    assert tiny.as_chat("a") == "a"


def test_an_unknown_keyword_gets_a_suggestion(tiny: LanguageModel) -> None:
    with pytest.raises(TypeError, match="'strid'; did you mean 'stride'"):
        tiny.generate("x", strid=2)


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    if not SMOLLM2.exists():
        pytest.skip(f"models/{SMOLLM2.name} is missing: idlm fetch smollm2")
    return load(SMOLLM2, dtype="float32", mask_token=MODELS["smollm2"].mask_token_id)


@pytest.fixture(scope="module")
def smollm2_greedy(smollm2: LanguageModel) -> Generation:
    return answer(
        smollm2, smollm2.as_chat("Write a short poem about the sea."), SamplingParams(max_tokens=32), stride=1
    )


@pytest.mark.parametrize("layout", ["branch", "standard"])
@pytest.mark.parametrize("stride", [pytest.param(2, marks=pytest.mark.slow), 4, 8])
def test_greedy_isd_on_smollm2_is_greedy_ar_token_for_token(
    stride: int, layout: str, smollm2: LanguageModel, smollm2_greedy: Generation
) -> None:
    prompt = smollm2.as_chat("Write a short poem about the sea.")
    isd = answer(smollm2, prompt, SamplingParams(max_tokens=32), stride=stride, layout=layout)
    assert isd.token_ids == smollm2_greedy.token_ids and isd.text == smollm2_greedy.text
    assert len(isd.token_ids) == 32
