"""What PyTorch computes from the real SmolLM2-135M-Instruct GGUF: token ids, margins and greedy text, no weights."""

import hashlib
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from golden.bpe import build_tokenizer, encode_chat, encode_texts
from golden.common import load, write_json, write_tensors

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n <= 1:\n",
    "In 2024, 12345 cats don't sleep because",
    'Once upon a time, there was a café — naïve, "small" & cheap —',
)
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
# Ids only. On the second text transformers differs: it does not know that `smollm` splits digits off first.
TOKENIZER_TEXTS = (
    "hello\n\n\nworld \t tabs",
    "a    12   3.14",
    "日本語 ☕ naïve WE'LL x2y",
    "<|im_start|>user\nhi<|im_end|>\n<empty_output>",
    "",
)
NEW_TOKENS = 48
TOP = 64


def read_tokenizer(path: Path) -> tuple[Tokenizer, str]:
    """The tokenizer of the file, built from its metadata alone, and the chat template."""
    fields = gguf.GGUFReader(path).fields
    pre = fields["tokenizer.ggml.pre"].contents()
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    return build_tokenizer(tokens, types, merges, pre), fields["tokenizer.chat_template"].contents()


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: list[int]) -> tuple[list[int], list[float], torch.Tensor]:
    """NEW_TOKENS greedy tokens (not stopping at eos), the top-2 logit gap of each, and the first row of logits."""
    result = model(input_ids=torch.tensor([ids]), use_cache=True)
    first = result.logits[0, -1].float()
    tokens: list[int] = []
    gaps: list[float] = []
    while True:
        top = result.logits[0, -1].float().topk(2)
        tokens.append(int(top.indices[0]))
        gaps.append(round(float(top.values[0] - top.values[1]), 5))
        if len(tokens) == NEW_TOKENS:
            return tokens, gaps, first
        step = torch.tensor([[tokens[-1]]])
        result = model(input_ids=step, past_key_values=result.past_key_values, use_cache=True)


def encode_checked(reference: PreTrainedTokenizerBase, tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids on which transformers and the independent tokenizer agree."""
    ids = reference(text)["input_ids"]
    if ids != tokenizer.encode(text).ids:
        raise AssertionError(f"two tokenizers disagree on {text!r}")
    return ids


def write_smollm2(path: Path, out: Path) -> None:
    """Write `smollm2.json` (text, ids, greedy continuations) and `smollm2.safetensors` (largest logits)."""
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer, template = read_tokenizer(path)
    chat = encode_chat(tokenizer, template, MESSAGES)
    texts = [*PROMPTS, chat["text"]]
    model = load(path.parent, gguf_file=path.name)
    rows: list[dict[str, Any]] = []
    logits = []
    for text in texts:
        ids = encode_checked(reference, tokenizer, text)
        tokens, gaps, first = greedy(model, ids)
        continuation = {"ids": tokens, "text": tokenizer.decode(tokens, skip_special_tokens=False), "top2_gap": gaps}
        rows.append({"text": text, "ids": ids, "continuation": continuation})
        logits.append(first)
    top = torch.stack(logits).topk(TOP)
    tensors = {
        "top_ids": top.indices,
        "top_logits": top.values,
        "logsumexp": torch.stack(logits).logsumexp(-1),
    }
    write_tensors(out / "smollm2.safetensors", tensors)
    value = {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "prompts": rows[:-1],
        "chat": rows[-1] | {"messages": MESSAGES},
        "texts": encode_texts(tokenizer, TOKENIZER_TEXTS),
    }
    write_json(out / "smollm2.json", value)
