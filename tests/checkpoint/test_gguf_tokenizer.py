"""Tokenizers built from GGUF metadata give the ids of the models' own tokenizers."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_jax.checkpoint.companions import load_tokenizer
from idlm_jax.checkpoint.gguf import GGUFSource
from idlm_jax.checkpoint.gguf_header import read_header
from idlm_jax.checkpoint.gguf_tokenizer import SPLITS, build_tokenizer
from idlm_jax.config import ModelConfig
from idlm_jax.errors import UserError
from tests.support import GOLDEN

FILES = {"smollm": GOLDEN / "gguf" / "llama_q4_1.gguf", "qwen2": GOLDEN / "gguf" / "qwen3_f32.gguf"}
CASES = json.loads((GOLDEN / "gguf" / "tokenizer.json").read_text(encoding="utf-8"))


def _metadata(**changes: Any) -> dict[str, Any]:
    """The tokenizer metadata of a golden file; a change of None removes the key."""
    metadata = read_header(FILES["smollm"]).metadata | {f"tokenizer.ggml.{key}": v for key, v in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def _pieces(text: str, **changes: Any) -> list[str]:
    tokenizer = build_tokenizer(_metadata(**changes), "test")
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("pre", sorted(FILES))
def test_token_ids_equal_the_golden_ones(pre: str) -> None:
    tokenizer = GGUFSource(FILES[pre]).tokenizer()
    for row in CASES[pre]["texts"]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["text"]


@pytest.mark.parametrize("pre", sorted(FILES))
def test_chat_template_comes_from_the_metadata(pre: str) -> None:
    tokenizer, chat = GGUFSource(FILES[pre]).tokenizer(), CASES[pre]["chat"]
    assert tokenizer.apply_chat_template(chat["messages"], tokenize=False, add_generation_prompt=True) == chat["text"]
    assert tokenizer(chat["text"])["input_ids"] == chat["ids"]


@functools.cache
def _smollm() -> Any:
    return GGUFSource(FILES["smollm"]).tokenizer()


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = _smollm()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("pre", sorted(FILES))
def test_written_companions_load_with_the_same_ids_and_config(pre: str, tmp_path: Path) -> None:
    source = GGUFSource(FILES[pre])
    source.copy_companions(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for row in [*CASES[pre]["texts"], CASES[pre]["chat"]]:
        assert tokenizer(row["text"])["input_ids"] == row["ids"]
    assert tokenizer.chat_template == source.tokenizer().chat_template
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text())) == source.config
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    # The name that transformers 4 knows, too.
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_each_pre_tokenizer_splits_numbers_its_own_way() -> None:
    # "1 2" is a merge of the golden vocabulary: it applies where digits may stand together.
    assert _pieces("the  12", pre="smollm") == ["t", "he", "ĠĠ", "1", "2"]
    assert _pieces("the  12", pre="qwen2") == ["t", "he", "Ġ", "Ġ", "1", "2"]
    assert _pieces("the  12", pre="llama-bpe", add_bos_token=False) == ["t", "he", "Ġ", "Ġ", "12"]
    assert _pieces("the  12", pre="gpt-2") == ["t", "he", "Ġ", "Ġ", "12"]


def test_only_qwen2_composes_accents() -> None:
    decomposed = "cafe\u0301"
    assert _pieces(decomposed, pre="qwen2") == ["c", "a", "f", "Ã©"]
    assert "Ã©" not in _pieces(decomposed, pre="smollm")


def test_begin_of_text_is_added_where_the_metadata_or_llama_3_asks_for_it() -> None:
    begin = "<|im_start|>"
    assert _pieces("he", add_bos_token=True) == [begin, "he"]
    assert _pieces("he", pre="llama-bpe", add_bos_token=None) == [begin, "he"]
    assert _pieces("he", pre="llama-bpe", add_bos_token=False) == ["he"]
    assert _pieces("he", add_bos_token=None) == ["he"]


def test_llama_3_takes_words_of_the_vocabulary_whole() -> None:
    metadata = _metadata(pre="llama-bpe", add_bos_token=False)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zebra"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    tokenizer = build_tokenizer(metadata, "test")
    assert tokenizer.convert_ids_to_tokens(tokenizer("zebra")["input_ids"]) == ["zebra"]


def test_user_defined_tokens_stay_whole_but_are_not_special() -> None:
    metadata = _metadata()
    kinds = list(metadata["tokenizer.ggml.token_type"])
    kinds[3] = 4
    tokenizer = build_tokenizer(metadata | {"tokenizer.ggml.token_type": kinds}, "test")
    ids = tokenizer("a<empty_output><|im_end|>")["input_ids"]
    assert 3 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<empty_output>"


def test_unused_rows_of_the_embedding_are_no_tokens() -> None:
    metadata = _metadata()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "[PAD280]"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 5]
    assert "[PAD280]" not in build_tokenizer(metadata, "test").get_vocab()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "llama"}, "kind 'llama' is not supported"),
        ({"model": None}, "no tokenizer"),
        ({"model": "no_vocab"}, "no tokenizer"),
        ({"pre": "qwen3"}, "'qwen3' is not supported .*did you mean 'qwen2'"),
        ({"pre": "default"}, "'default' is not supported"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["no such"]}, "do not fit together"),
        ({"token_type": [1]}, "280 tokens but 1 token types"),
        ({"eos_token_id": 280}, "eos_token_id 280 is outside"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build_tokenizer(_metadata(**changes), "file.gguf")
    assert "\n" not in str(caught.value)


def test_a_file_without_tokenizer_still_gives_its_configs(tmp_path: Path) -> None:
    source = GGUFSource(FILES["smollm"])
    source.metadata = _metadata(model=None)
    source.copy_companions(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "generation_config.json"]


def test_every_known_pre_tokenizer_builds() -> None:
    for pre in SPLITS:
        tokenizer = build_tokenizer(_metadata(pre=pre), "test")
        assert (
            tokenizer.decode(tokenizer("It's 12,  café\n")["input_ids"], skip_special_tokens=True) == "It's 12,  café\n"
        )
