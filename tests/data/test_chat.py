"""Chats are read from all their forms, and the loss mask lies on what the assistant says, for any template."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_jax.checkpoint.gguf import GGUFSource
from idlm_jax.data.chat import Message, encode_chat, encode_text, parse_document, read_prompts
from idlm_jax.errors import UserError
from tests.support import GOLDEN

# ChatML with the assistant's part between the tags from which transformers makes a mask itself.
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNTAGGED = re.sub(r"{% (end)?generation %}", "", TAGGED)
# As Qwen3's: the last answer gets a block of thinking, empty if it has none; earlier ones lose theirs.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% if loop.last %}"
    "{{ '<think>\n' + (parts[0].split('<think>')[-1] | trim if parts | length > 1 else '') + '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Another end token, a space before it, contents trimmed, no line end behind it.
TERSE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ':\n' + m.content | trim + ' <|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant:\n' }}{% endif %}"
)


@functools.cache
def tokenizer(template: str | None = None) -> Any:
    made = GGUFSource(GOLDEN / "gguf" / "qwen3_f32.gguf").tokenizer()
    made.chat_template = made.chat_template if template is None else template
    return made


def says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def chat(*contents: str) -> list[Message]:
    return [says(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]


def targets(messages: list[Message], template: str | None = None) -> list[str]:
    """The runs of target tokens as text."""
    tokens, loss_mask = encode_chat(tokenizer(template), messages)
    edges = np.flatnonzero(np.diff(loss_mask.astype(int), prepend=0, append=0))
    return [tokenizer().decode(tokens[start:stop]) for start, stop in edges.reshape(-1, 2)]


# Without special tokens and white space at the start; texts that look like a mark or like thinking are welcome.
contents = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["", "⟨end⟩", "hello\n", "</s> ", "12 "]
)
contents = contents.filter(lambda text: text == text.lstrip() and "<|" not in text)
chats = st.tuples(st.sampled_from([[], ["system"]]), st.lists(contents, min_size=2, max_size=7)).map(
    lambda drawn: [*(says(role, "be short") for role in drawn[0]), *chat(*drawn[1])]
)


@settings(deadline=None, max_examples=60)
@given(messages=chats)
def test_the_loss_mask_is_that_of_transformers_for_a_template_with_generation_tags(messages: list[Message]) -> None:
    expected = tokenizer(TAGGED).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    for template in (TAGGED, UNTAGGED):
        tokens, loss_mask = encode_chat(tokenizer(template), messages)
        assert tokens.tolist() == expected["input_ids"]
        assert loss_mask.tolist() == [bool(m) for m in expected["assistant_masks"]]


@settings(deadline=None, max_examples=30)
@given(messages=chats, template=st.sampled_from([None, UNTAGGED, THINKING, TERSE]))
def test_targets_are_the_assistants_turns_of_the_rendered_text(messages: list[Message], template: str | None) -> None:
    text = tokenizer(template).apply_chat_template(messages, tokenize=False)
    turns = re.findall(r"<\|im_start\|>assistant:?\n(.*?<\|(?:im_end|endoftext)\|>)", text, re.DOTALL)
    normal = [tokenizer().decode(tokenizer()(turn)["input_ids"]) for turn in turns]  # Unicode made canonical
    assert targets(messages, template) == normal


def test_only_what_the_full_text_holds_is_trained_on() -> None:
    messages = chat("q", "<think>\nwhy\n</think>\n\nfirst", "more", "<think>\nhm\n</think>\n\nsecond")
    assert targets(messages, THINKING) == ["first<|im_end|>", "<think>\nhm\n</think>\n\nsecond<|im_end|>"]
    assert targets(chat("q", "a"), THINKING) == ["<think>\n\n</think>\n\na<|im_end|>"]


def test_neither_header_nor_line_end_nor_other_turns_are_targets() -> None:
    tokens, loss_mask = encode_chat(tokenizer(), chat("hello", "the", "hello"))
    text = [tokenizer().decode([token]) for token in tokens[loss_mask]]
    assert "".join(text) == "the<|im_end|>"
    rest = tokenizer().decode(tokens[~loss_mask])
    assert rest.endswith("<|im_start|>assistant\n\n<|im_start|>user\nhello<|im_end|>\n")


def test_a_token_that_joins_header_and_answer_is_no_target() -> None:
    from tokenizers import AddedToken

    joined = GGUFSource(GOLDEN / "gguf" / "qwen3_f32.gguf").tokenizer()
    joined.add_tokens([AddedToken("\n\n", normalized=False)])
    tokens, loss_mask = encode_chat(joined, chat("q", "\nthe"))
    assert joined.decode(tokens[loss_mask]) == "the<|im_end|>"
    assert joined.convert_tokens_to_ids("\n\n") in tokens


def test_a_chat_without_an_answer_has_no_target() -> None:
    assert targets(chat("q")) == []


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
            chat("q", "a"),
            "no special token",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}",
            chat("q", "a"),
            "renders message 2 differently",
        ),
        (UNTAGGED.replace("m.content", "m.content[:3]"), chat("q", "answer"), "no special token|differently"),
        (
            "{% if messages | length > 1 %}{{ raise_exception('users only') }}{% endif %}",
            chat("q", "a"),
            "refuses this chat: users only",
        ),
        ("", chat("q", "a"), "no chat template"),
    ],
)
def test_templates_that_give_no_mask_are_refused(template: str, messages: list[Message], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        encode_chat(tokenizer(template), messages)
    assert "\n" not in str(caught.value)


def test_text_ends_with_the_end_token_and_begins_as_the_tokenizer_wants() -> None:
    plain = tokenizer()("hello")["input_ids"]
    assert encode_text(tokenizer(), "hello").tolist() == [*plain, 2]
    assert encode_text(tokenizer(), "hello", end=False).tolist() == plain
    from idlm_jax.checkpoint.gguf_tokenizer import build_tokenizer

    metadata = GGUFSource(GOLDEN / "gguf" / "qwen3_f32.gguf").metadata
    begins = build_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": True}, "test")
    assert encode_text(begins, "hello").tolist() == [1, *plain, 2]
    assert encode_text(begins, "hello", begin=False).tolist() == [*plain, 2]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": chat("q", "a", "r", "b"), "id": 7},
        {"messages": [{**message, "name": "x", "weight": 1} for message in chat("q", "a", "r", "b")], "prompt": "q"},
        {
            "conversations": [
                {"from": who, "value": text} for who, text in zip(["human", "gpt"] * 2, "qarb", strict=True)
            ]
        },
    ],
)
def test_forms_of_chats_are_read_alike(record: dict[str, Any]) -> None:
    assert parse_document(json.dumps(record).encode()) == chat("q", "a", "r", "b")


def test_pairs_texts_and_reasoning_are_read() -> None:
    for key in ("response", "completion"):
        assert parse_document(json.dumps({"prompt": "q", key: "a"}).encode()) == chat("q", "a")
    assert parse_document('\ufeff{"text": "grüße", "url": ""}\n'.encode()) == "grüße"
    said = {"role": "assistant", "content": "a", "reasoning_content": "why"}
    assert parse_document(json.dumps({"messages": [says("user", "q"), said]}).encode()) == [says("user", "q"), said]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8 text"),
        (b'["a"]', "expected a JSON object"),
        (b'{"texts": "a"}', 'expected "messages".*the keys here are: texts'),
        (b"{}", "the keys here are: none"),
        (b'{"text": ""}', '"text" is not a text, or empty'),
        (b'{"text": 3}', '"text" is not a text, or empty'),
        (b'{"prompt": "q"}', '"prompt" without "response" or "completion"'),
        (b'{"messages": []}', '"messages" is not a list'),
        (b'{"messages": [{"role": "user"}]}', "message 1 is not a"),
        (b'{"messages": [{"role": "user", "content": ["a"]}]}', "message 1 is not a"),
        (b'{"messages": [{"role": "asistant", "content": "a"}]}', "'asistant'.*did you mean 'assistant'"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "begins with the assistant"),
        (b'{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}', "calls tools"),
        (b'{"conversations": [{"from": "robot", "value": "a"}]}', "unknown role 'robot' .one of system, human"),
        (b"[" * 10**5, "nested too deeply|not valid JSON"),
    ],
)
def test_bad_lines_say_what_is_wrong(line: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        parse_document(line)
    assert "\n" not in str(caught.value)


def test_prompts_are_chats_up_to_the_last_user_message(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    records = [{"prompt": "q"}, {"prompt": "q", "response": "a"}, {"messages": chat("q", "a", "r", "b")}]
    file.write_text("\n\n".join(map(json.dumps, records)))
    assert read_prompts(file) == [chat("q"), chat("q"), chat("q", "a", "r")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the file is empty"),
        ('{"prompt": "q"}\n\n{"text": "a"}', 'prompts.jsonl:3: expected "messages"'),
        ('{"messages": [{"role": "system", "content": "a"}]}', "prompts.jsonl:1: no user message"),
    ],
)
def test_prompts_that_are_none_are_refused_by_file_and_line(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=reason):
        read_prompts(file)
    with pytest.raises(UserError, match="cannot read"):
        read_prompts(tmp_path / "nowhere.jsonl")
