"""The tokenizer of a Hugging Face directory, whatever its config.json says."""

import json
from pathlib import Path

import pytest

from idlm_jax.checkpoint.hf import write_hf
from idlm_jax.checkpoint.open import open_source
from tests.support import GOLDEN

TEXT = "The answer is 42; grüße!\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "hf"
    write_hf(open_source(GOLDEN / "gguf" / "llama_f32.gguf"), path)
    return path


def test_exported_tokenizer_is_that_of_the_source(directory: Path) -> None:
    ours, original = (open_source(path).tokenizer() for path in (directory, GOLDEN / "gguf" / "llama_f32.gguf"))
    assert ours(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    assert ours.chat_template == original.chat_template
    assert ours.special_tokens_map == original.special_tokens_map


@pytest.mark.parametrize("tokenizer_class", [None, "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_remote_code_is_neither_run_nor_asked_about(
    tokenizer_class: str | None, directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "sdar", "auto_map": auto_map}))
    for name in ("configuration_sdar.py", "modeling_sdar.py"):
        (tmp_path / name).write_text("raise SystemExit('this must not run')")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = tokenizer_class
    if tokenizer_class is None:
        del settings["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    capfd.readouterr()
    from idlm_jax.checkpoint.companions import load_tokenizer

    assert load_tokenizer(tmp_path)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
