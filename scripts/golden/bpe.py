"""A tiny byte-level BPE vocabulary, and tokenizers built straight from the parts that a GGUF file carries.

The tokenizers are put together here from the `tokenizers` library alone, so that they check a GGUF reader
(including the one of transformers, which ignores the `smollm` rule that every digit stands alone).
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NORMAL, CONTROL = 1, 3  # tokenizer.ggml.token_type
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>")
# "1 2" never applies under `smollm` nor `qwen2`, which both split digits apart.
MERGES = (
    *("Ġ t", "h e", "Ġt he", "i n", "r e", "o n", "e r", "l l", "he ll", "hell o", "o r", "w or", "Ġ wor", "l d"),
    *("Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "Ã ©", "1 2", "Ġ hello"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2's rule: single digits, words with at most one leading non-letter, runs of punctuation, line ends together.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "hello world",
    "the  hello\n\n\nworld",
    "In 2024, 12 or 1212 words    9.",
    "don't can't WE'LL",
    "café ☕ 日本語 naïve",
    "   12",
    "x = [1,2];\r\n\treturn 'a'  ",
    "<|im_start|>user\nhello<|im_end|>\n",
    "a<empty_output><|endoftext|>b",
    "",
)


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges in the order of a GGUF file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [merge.replace(" ", "") for merge in MERGES]
    types = [CONTROL] * len(SPECIALS) + [NORMAL] * (len(alphabet) + len(merged))
    return [*SPECIALS, *alphabet, *merged], types, list(MERGES)


def build_tokenizer(tokens: list[str], types: list[int], merges: list[str], pre: str) -> Tokenizer:
    """A byte-level BPE with the pre-tokenizer that llama.cpp calls `pre`."""
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        parts = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    elif pre == "qwen2":
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        raise ValueError(f"unknown pre-tokenizer {pre!r}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: tuple[str, ...] = TEXTS) -> list[dict[str, Any]]:
    """Each text with its ids; decoding them must give the text back."""
    rows = []
    for text in texts:
        ids = tokenizer.encode(text).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise AssertionError(f"{text!r} does not survive the round trip")
        rows.append({"text": text, "ids": ids})
    return rows


def encode_chat(tokenizer: Tokenizer, template: str, messages: list[dict[str, str]]) -> dict[str, Any]:
    """A chat under its template, with the generation prompt."""
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)
    text = wrapped.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {"messages": messages, "text": text, "ids": tokenizer.encode(text).ids}
