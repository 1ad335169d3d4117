"""From tokens to text: nothing lost, nothing shown that a stop string would take back, drafts flagged."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from idlm_jax.checkpoint.open import open_source
from idlm_jax.decoding.generate import Emission
from idlm_jax.decoding.text import Piece, TextBuilder, token_bytes
from idlm_jax.model import drafted_flags
from tests.support import GOLDEN

END = 2


@cache
def tokenizer():
    """The byte-level tokenizer of a golden GGUF file."""
    return open_source(GOLDEN / "gguf" / "llama_f32.gguf").tokenizer()


def ids(text: str) -> list[int]:
    return list(tokenizer()(text).input_ids)


def builder(*stop: str) -> TextBuilder:
    return TextBuilder(tokenizer(), stop, [END])


def feed(build: TextBuilder, tokens: Sequence[int]) -> str:
    return "".join(piece.text for piece in build.feed(tokens, [False] * len(tokens)))


def finish(build: TextBuilder) -> str:
    return "".join(piece.text for piece in build.finish())


def chunks(tokens: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    """The tokens in rounds of the given sizes, repeated."""
    parts, at, turn = [], 0, 0
    while at < len(tokens):
        parts.append(tokens[at : at + sizes[turn % len(sizes)]])
        at, turn = at + len(parts[-1]), turn + 1
    return parts


any_tokens = st.lists(st.integers(3, 279), max_size=40)
any_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(deadline=None)
@given(any_tokens, any_sizes)
def test_pieces_join_to_what_the_tokenizer_decodes(tokens: list[int], sizes: list[int]) -> None:
    build = builder()
    shown = "".join(feed(build, part) for part in chunks(tokens, sizes)) + finish(build)
    assert shown == build.text == tokenizer().decode(tokens, skip_special_tokens=True)
    assert (build.token_ids, build.finish_reason) == (tokens, "length")


@settings(deadline=None)
@given(any_tokens, any_sizes)
def test_an_end_token_ends_the_text_and_is_not_in_it(tokens: list[int], sizes: list[int]) -> None:
    build = builder()
    shown = "".join(feed(build, part) for part in chunks([*tokens, END, *tokens], sizes)) + finish(build)
    assert shown == build.text == tokenizer().decode(tokens, skip_special_tokens=True)
    assert (build.token_ids, build.finish_reason) == ([*tokens, END], "stop")


def test_an_end_token_that_is_ordinary_text_is_not_in_the_text() -> None:
    a, b = ids("a"), ids("b")
    build = TextBuilder(tokenizer(), (), b)
    assert feed(build, a + b + a) == "a" and finish(build) == ""
    assert build.finish_reason == "stop"


# Few letters and whole words that are one token each, so that stop strings begin and end inside tokens.
letters = st.lists(st.sampled_from(["a", "b", "hello", " hello", "12", "l", "o", "h", "e"]), max_size=20)
stops = st.lists(st.text("abhelo 12", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(deadline=None)
@given(letters, stops, any_sizes)
def test_text_ends_before_the_first_stop_string_wherever_it_lies(
    words: list[str], stop: list[str], sizes: list[int]
) -> None:
    tokens = [token for word in words for token in ids(word)]
    expected, kept = tokenizer().decode(tokens), len(tokens)
    for count in range(len(tokens) + 1):
        text = tokenizer().decode(tokens[:count])
        found = [text.find(s) for s in stop if s in text]
        if found:
            expected, kept = text[: min(found)], count
            break
    build = builder(*stop)
    shown = ""
    for part in chunks(tokens, sizes):
        shown += feed(build, part)
        assert expected.startswith(shown)  # what was shown is never taken back
    shown += finish(build)
    assert shown == build.text == expected
    assert len(build.token_ids) == kept
    assert build.finish_reason == ("stop" if kept < len(tokens) or any(s in text for s in stop) else "length")


def test_text_that_may_become_a_stop_string_is_held_back_and_no_more() -> None:
    build = builder("abc", "zz")
    assert feed(build, ids("x")) == "x"
    assert feed(build, ids("ab")) == ""
    assert feed(build, ids("a")) == "ab"
    assert feed(build, ids("z")) == "a"
    assert feed(build, ids("y")) == "zy"
    assert feed(build, ids("ab")) == ""
    assert finish(build) == "ab"


@settings(deadline=None)
@given(letters, stops, any_sizes)
def test_a_token_has_appeared_once_its_first_character_has_and_never_behind_a_stop_string(
    words: list[str], stop: list[str], sizes: list[int]
) -> None:
    tokens, begins, text = [], [], ""
    for token in (token for word in words for token in ids(word)):
        tokens, begins = [*tokens, token], [*begins, len(text)]
        text = tokenizer().decode(tokens)
    build, shown = builder(*stop), ""
    for part in chunks(tokens, sizes):
        shown += feed(build, part)
        assert build.shown == sum(begin < len(shown) for begin in begins)
    shown += finish(build)
    assert build.shown == sum(begin < len(shown) for begin in begins)
    assert build.offsets == begins[: len(build.offsets)]


@settings(deadline=None)
@given(any_tokens, any_sizes, st.booleans())
def test_at_the_end_every_token_has_appeared(tokens: list[int], sizes: list[int], end: bool) -> None:
    build = builder()
    for part in chunks([*tokens, *[END] * end], sizes):
        feed(build, part)
    finish(build)
    assert build.shown == len(build.token_ids) == len(build.offsets) == len(tokens) + end
    assert build.offsets == sorted(build.offsets) and all(at <= len(build.text) for at in build.offsets)


def test_of_several_stop_strings_the_earliest_wins() -> None:
    build = builder("ello", "hell")
    assert feed(build, ids("a hello")) == "a " and build.finish_reason == "stop"


def test_a_character_of_several_tokens_waits_for_its_last_byte() -> None:
    first, second = ids("ö")
    build = builder()
    assert (feed(build, [first]), build.shown) == ("", 0)
    assert (feed(build, [second]), build.shown) == ("ö", 2)
    assert finish(build) == "" and build.offsets == [0, 0]


@pytest.mark.parametrize("ending", [[], [END]])
def test_a_character_that_stays_incomplete_is_shown_as_a_replacement(ending: list[int]) -> None:
    build = builder()
    assert feed(build, ids("a") + ids("ö")[:1] + ending) + finish(build) == "a�"


@settings(deadline=None)
@given(st.text(max_size=30))
def test_the_bytes_of_tokens_join_to_those_of_the_text(text: str) -> None:
    known = token_bytes(tokenizer(), 300)
    assert b"".join(known[token] for token in ids(text)) == text.encode()


def test_bytes_of_special_tokens_are_their_names_and_unknown_tokens_have_none() -> None:
    known = token_bytes(tokenizer(), 300)
    assert known[:3] == [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>"]
    assert known[280:] == [b""] * 20 and all(known[:280])


def test_bytes_of_tokens_of_a_vocabulary_of_text() -> None:
    """As Llama 2 has it: a sign for the space, and names for the bytes of what is not in the vocabulary."""
    names = ["<unk>", "▁", "a", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(BPE({name: i for i, name in enumerate(names)}, [("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    known = token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend), len(names))
    tokens = backend.encode("a aö€").ids
    assert len(tokens) == 2 + 2 + 3 and known[3] == b" a"
    assert b"".join(known[token] for token in tokens) == "a aö€".encode()


def test_drafted_characters_are_told_apart() -> None:
    build = builder()
    tokens = [*ids("a"), *ids("b"), *ids("h"), *ids("ö")]
    assert build.feed(tokens, [True, False, False, True, False]) == [Piece("a", True), Piece("bhö", False)]


def test_drafted_flags_follow_the_history_of_rounds() -> None:
    # A cold round, one that accepts two, one that accepts none, one that accepts three and is cut after two.
    emission = Emission(np.arange(7), np.array([-1, 2, 0, 3]), True)
    assert drafted_flags(emission) == [False, True, True, False, False, True, True]


@settings(deadline=None)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=20), st.integers(0, 3))
def test_every_round_ends_with_one_token_that_was_not_drafted(history: list[int], cut: int) -> None:
    emitted = sum(max(outcome, 0) + 1 for outcome in history)
    kept = max(emitted - min(cut, max(history[-1], 0)), 1)
    flags = drafted_flags(Emission(np.arange(kept), np.array(history), True))
    assert len(flags) == kept
    assert flags.count(False) == len(history) - (kept < emitted)
