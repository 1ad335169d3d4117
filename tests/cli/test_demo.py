"""``idlm demo``: prepares its model once, shows equal texts, and fails when they are not."""

import hashlib
import shutil
from pathlib import Path

import pytest

from idlm_jax.checkpoint import fetch
from idlm_jax.checkpoint.fetch import KnownModel
from tests.cli.decoding_support import TINY, Script, refused, run

TEXT = "hello 12 and hello"
SHORT = ("--prompt", "12", "--max-tokens", 20)


@pytest.fixture
def tiny_as_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models directory in which a tiny model plays SmolLM2, already fetched."""
    data = TINY.read_bytes()
    known = KnownModel("none", "0", TINY.name, len(data), hashlib.sha256(data).hexdigest(), 0, "none")
    monkeypatch.setitem(fetch.MODELS, "smollm2", known)
    shutil.copy(TINY, tmp_path)
    return tmp_path


def test_demo_converts_once_and_shows_that_isd_is_ar(
    tiny_as_smollm2: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "demo", *SHORT, "--directory", tiny_as_smollm2)
    assert (code, err) == (0, "")
    assert "converted to" in out and out.count(TEXT) == 2 and out.count("AR and ISD, identical") == 2
    assert all(line in out for line in ("tokens a forward (TPF)", "acceptance by depth", "seconds of decoding"))
    assert "token for token" in out and "has not been trained to draft" in out
    assert [(p.stride, p.layout.name) for p in script.policies] == 2 * [(1, "branch"), (4, "branch"), (4, "standard")]
    assert [s.temperature for s in script.sampling] == [0.0] * 3 + [0.8] * 3
    # Converted once, the fetched file is not looked for again.
    (tiny_as_smollm2 / TINY.name).unlink()
    code, out, _ = run(capsys, "demo", *SHORT, "--directory", tiny_as_smollm2)
    assert code == 0 and "converted" not in out


def test_demo_fails_in_float32_and_only_remarks_in_bfloat16_when_a_text_differs(
    script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("idlm_jax.evaluation.equivalence.first_difference", lambda *tokens: 1)
    model = ("demo", *SHORT, "--model", TINY, "--mask-token", 0)
    code, out, err = run(capsys, *model)
    assert code == 1 and "idlm: error: a text differs from AR's" in err
    assert "first difference" in out and "In float32 the texts should be equal" in out
    code, out, _ = run(capsys, *model, "--dtype", "bfloat16")
    assert code == 0 and "In bfloat16, tokens whose logits are nearly equal can change places" in out


def test_real_demo_on_a_tiny_model_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "demo", *SHORT, "--model", TINY, "--mask-token", 0)
    assert code == 0 and out.count("AR and ISD, identical") == 2 and "has not been trained" not in out


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the prompt is empty" in refused(capsys, "demo", "--prompt", "")
    assert "--mask-token" in refused(capsys, "demo", "--model", TINY)
    assert "no such" in refused(capsys, "demo", "--model", tmp_path / "nowhere")
