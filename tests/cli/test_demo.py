"""``idlm demo``: prepares its model once, shows equal texts, and fails when they are not."""

import hashlib
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from idlm_jax.backbone.adapter import AdapterConfig, init_adapter
from idlm_jax.checkpoint import fetch, shipped
from idlm_jax.checkpoint.fetch import KnownModel
from idlm_jax.checkpoint.open import open_source
from idlm_jax.checkpoint.peft import save_adapter
from idlm_jax.cli.demo import PROMPTS
from tests.cli.decoding_support import TINY, Script, refused, run

TEXT = "hello 12 and hello"
SHORT = ("--prompt", "12", "--max-tokens", 20)


@pytest.fixture
def tiny_as_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models directory in which a tiny model plays SmolLM2, already fetched; no adapter comes with the package."""
    data = TINY.read_bytes()
    known = KnownModel("none", "0", TINY.name, len(data), hashlib.sha256(data).hexdigest(), 0, "none")
    monkeypatch.setitem(fetch.MODELS, "smollm2", known)
    monkeypatch.setattr(shipped, "ADAPTERS", tmp_path / "adapters")
    shutil.copy(TINY, tmp_path)
    return tmp_path


@pytest.fixture
def tiny_adapter(tiny_as_smollm2: Path) -> Path:
    """An adapter of the tiny model plays the one that comes with the package."""
    config = AdapterConfig(rank=2, alpha=4, target_modules=("q_proj",), mask_token_id=0)
    adapter = init_adapter(open_source(TINY).config, config, jax.random.key(0), jnp.float32)
    save_adapter(adapter, tiny_as_smollm2 / "adapters" / "smollm2_n4")
    return tiny_as_smollm2


def test_demo_converts_once_and_shows_that_isd_is_ar(
    tiny_as_smollm2: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "demo", *SHORT, "--directory", tiny_as_smollm2)
    assert (code, err) == (0, "")
    assert "converted to" in out and out.count(TEXT) == 2 and out.count("AR and ISD, identical") == 2
    assert all(line in out for line in ("tokens a forward (TPF)", "acceptance by depth", "seconds of decoding"))
    assert "token for token" in out
    assert [(p.stride, p.layout.name) for p in script.policies] == 2 * [(1, "branch"), (4, "branch"), (4, "standard")]
    assert [s.temperature for s in script.sampling] == [0.0] * 3 + [0.8] * 3
    # Converted once, the fetched file is not looked for again.
    (tiny_as_smollm2 / TINY.name).unlink()
    code, out, _ = run(capsys, "demo", *SHORT, "--directory", tiny_as_smollm2)
    assert code == 0 and "converted" not in out


def test_default_prompts_are_all_answered_and_the_tables_hold_their_totals(
    tiny_as_smollm2: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "demo", "--directory", tiny_as_smollm2, "--max-tokens", 20)
    assert code == 0 and all(out.count(prompt) == 2 for prompt in PROMPTS)
    assert out.count("AR and ISD, identical") == 2 * len(PROMPTS)
    tables = [
        [int(cell) for cell in line.split()[1:]] for line in out.splitlines() if line[:9] in (" tokens  ", " forwards")
    ]
    # Three prompts, each one cold round and then three tokens a round.
    tokens, forwards = tables[:2]
    each = tokens[0] // 3
    assert tokens == [3 * each] * 3 and forwards == [3 * each] + [3 * (1 + math.ceil((each - 1) / 3))] * 2
    assert f"{tokens[1]} tokens took {forwards[1]} forward passes" in out and "1.5 s against 1.5 s, 1.00 times" in out


@pytest.mark.parametrize("tokens_a_round", [1, 3])
def test_the_last_words_follow_what_happened(
    tokens_a_round: int, tiny_as_smollm2: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    script.tokens_a_round = tokens_a_round
    code, out, _ = run(capsys, "demo", *SHORT, "--directory", tiny_as_smollm2)
    assert code == 0 and ("rarely right" in out) == (tokens_a_round == 1)


def test_the_shipped_adapter_is_used_by_default_and_only_for_smollm2(
    tiny_adapter: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = ("--directory", tiny_adapter)
    assert "with adapter smollm2-n4: qwen3" in run(capsys, "demo", *SHORT, *directory)[1]
    for flags in (["--no-adapter"], ["--model", TINY, "--mask-token", 0]):
        code, out, _ = run(capsys, "demo", *SHORT, *directory, *flags)
        assert code == 0 and "with adapter" not in out and "lacks" not in out
    other = tiny_adapter / "adapters" / "smollm2_n4"
    assert f"with adapter {other}" in run(capsys, "demo", *SHORT, *directory, "--adapter", other)[1]


def test_without_a_shipped_adapter_the_demo_says_so_in_one_line_and_goes_on(
    tiny_as_smollm2: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "demo", *SHORT, "--directory", tiny_as_smollm2)
    assert code == 0
    assert out.startswith("This installation lacks the adapter smollm2-n4: SmolLM2 drafts untrained.\n")


def test_demo_fails_in_float32_and_only_remarks_in_bfloat16_when_a_text_differs(
    script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("idlm_jax.evaluation.equivalence.first_difference", lambda *tokens: 1)
    model = ("demo", *SHORT, "--prompt", "13", "--model", TINY, "--mask-token", 0)
    code, out, err = run(capsys, *model)
    assert code == 1 and "idlm: error: a text differs from AR's" in err and "token for token" not in out
    assert "first difference" in out and "0 of 2 texts" in out and "In float32 the texts should be equal" in out
    code, out, err = run(capsys, *model, "--dtype", "bfloat16")
    assert (code, err) == (0, "") and "In bfloat16, tokens whose logits are nearly equal can change places" in out


def test_real_demo_on_a_tiny_model_agrees(tiny_adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "demo", *SHORT, "--directory", tiny_adapter)
    assert code == 0 and "with adapter" in out and out.count("AR and ISD, identical") == 2


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the prompt is empty" in refused(capsys, "demo", "--prompt", "a", "--prompt", "")
    assert "--mask-token" in refused(capsys, "demo", "--model", TINY)
    assert "no such" in refused(capsys, "demo", "--model", tmp_path / "nowhere")
    assert "not both" in refused(capsys, "demo", "--adapter", "smollm2-n4", "--no-adapter")
    assert "did you mean 'smollm2-n4'" in refused(capsys, "demo", "--model", TINY, "--adapter", "smollm-n4")
