"""A transformers tokenizer from the metadata of a GGUF file: byte-level BPE, special tokens, chat template.

transformers reads GGUF tokenizers itself, but only with torch installed, and without the rule of ``smollm`` that each
digit stands alone. The pre-tokenizers here are those of the models' own tokenizer.json files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idlm_jax.checkpoint import companions
from idlm_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# tokenizer.ggml.token_type
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

# Words with at most one leading non-letter, numbers, runs of punctuation, line ends together; %s: how numbers split.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre to the regular expression that splits; None: GPT-2's, which is built into the byte-level step.
# "default", which llama.cpp writes where it does not know, is left out: it is no model's own rule.
SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "qwen2": _WORDS % r"\p{N}",
    "llama-bpe": _WORDS % r"\p{N}{1,3}",
    "llama3": _WORDS % r"\p{N}{1,3}",
    "llama-v3": _WORDS % r"\p{N}{1,3}",
}
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
SPECIAL_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether the file carries a tokenizer at all."""
    return metadata.get("tokenizer.ggml.model", "no_vocab") not in ("no_vocab", "none")


def build_tokenizer(metadata: Mapping[str, Any], where: str) -> "PreTrainedTokenizerBase":
    """The tokenizer that the metadata describes; raises UserError for any but byte-level BPE of a known kind."""
    with companions.without_torch_advice():
        from transformers import PreTrainedTokenizerFast

    pre = _check_kind(metadata, where)
    tokens = _list_of(metadata, "tokens", where)
    ids = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in SPECIAL_ROLES}
    for role, token_id in ids.items():
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise UserError(f"{where}: tokenizer.ggml.{role}_token_id {token_id} is outside the vocabulary")
    special = {SPECIAL_ROLES[role]: tokens[token_id] for role, token_id in ids.items() if token_id is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(metadata, tokens, pre, where),
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=_context_length(metadata),
        clean_up_tokenization_spaces=False,
        **special,
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", target: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat template, readable by transformers 4 and 5."""
    tokenizer.save_pretrained(target)
    path = target / "tokenizer_config.json"
    config = companions.read_json(path)
    config.pop("backend", None)
    # transformers 5 writes a class name of its own and still reads the one that transformers 4 knows.
    companions.write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _check_kind(metadata: Mapping[str, Any], where: str) -> str:
    if not has_tokenizer(metadata):
        raise UserError(f"{where}: the file has no tokenizer")
    model = metadata["tokenizer.ggml.model"]
    if model != "gpt2":
        raise UserError(f"{where}: tokenizer of kind '{model}' is not supported (supported: gpt2, byte-level BPE)")
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        raise UserError(f"{where}: tokenizer.ggml.pre is missing, so how text splits is unknown; use a newer file")
    if pre not in SPLITS:
        raise UserError(
            f"{where}: pre-tokenizer '{pre}' is not supported (supported: {', '.join(SPLITS)})"
            + did_you_mean(str(pre), SPLITS)
        )
    return pre


def _backend(metadata: Mapping[str, Any], tokens: list[str], pre: str, where: str) -> "Tokenizer":
    """The ``tokenizers`` pipeline: normaliser, splits, BPE, added tokens, begin and end of text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise UserError(f"{where}: {len(tokens)} tokens but {len(kinds)} token types")
    parts = [merge.partition(" ") for merge in _list_of(metadata, "merges", where)]
    merges = [(left, right) for left, _, right in parts]
    # Unused rows pad the embedding; text never contains them.
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    try:
        # Llama 3 takes a word that is a token whole, without walking through its merges.
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in LLAMA3))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: vocabulary and merges do not fit together: {error}") from None
    split = SPLITS[pre]
    if pre == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    else:
        first = [] if split is None else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)
    _add_ends(backend, metadata, tokens, pre)
    return backend


def _add_ends(backend: "Tokenizer", metadata: Mapping[str, Any], tokens: list[str], pre: str) -> None:
    """Put begin and end of text around each text where the metadata says so; llama.cpp's default is Llama 3's bos."""
    from tokenizers import processors

    wanted = {
        "bos": metadata.get("tokenizer.ggml.add_bos_token", pre in LLAMA3),
        "eos": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    ids = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role, add in wanted.items() if add}
    pieces = {role: (tokens[token_id], token_id) for role, token_id in ids.items() if token_id is not None}
    if not pieces:
        return
    before, after = ([pieces[role][0]] if role in pieces else [] for role in ("bos", "eos"))
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[*pieces.values()],
    )


def _list_of(metadata: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list):
        raise UserError(f"{where}: tokenizer.ggml.{key} is missing")
    return value


def _context_length(metadata: Mapping[str, Any]) -> int:
    architecture = metadata.get("general.architecture")
    return metadata.get(f"{architecture}.context_length") or int(1e30)
