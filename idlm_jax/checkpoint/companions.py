"""The files that travel beside the weights: configuration, tokenizer, chat template, licence.

They are copied byte for byte through every conversion, so that what Hugging Face libraries read stays what it was.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    # Remote code that `auto_map` of config.json names (I-DLM's official checkpoints); copied, never run.
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)


def copy_companions(source: Path, target: Path) -> None:
    """Copy every companion file of one checkpoint directory into another."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises UserError for a missing file, bad JSON, or anything but an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); the file may be damaged or incomplete") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON object the way transformers writes its own."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory; raises UserError when it holds none or a broken one."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"{directory}: no tokenizer (tokenizer.json); copy the tokenizer files of the model into it")
    with without_torch_advice():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    # tokenizer.json says all that matters. AutoTokenizer would look for the model_type, which need not be known
    # ('sdar'), and offer to run the code that config.json names; it is left with the older file formats.
    generic = (directory / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if generic else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"{directory}: cannot load the tokenizer: {' '.join(str(error).split())}") from None
    assert tokenizer is not None
    return tokenizer


@contextmanager
def without_torch_advice() -> Iterator[None]:
    """transformers advises at its first import to install PyTorch; tokenizers, all that is used of it, need none."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
