"""`idlm plan`: help that teaches, and one line for what the user can mend."""

import pytest

from idlm_jax.cli import main as cli
from idlm_jax.cli.plans import parse_mesh
from idlm_jax.errors import UserError
from idlm_jax.planning import targets
from idlm_jax.training.config import MeshSettings
from tests.cli.decoding_support import refused

DECODE = ["plan", "decode", "configs/models/qwen3-8b.yaml", "--target"]
TRAIN = ["plan", "train", "configs/train/qwen3-8b_gated_lora_r128.yaml", "--target"]


@pytest.mark.parametrize("verb", ["train", "decode"])
def test_help_has_examples_and_the_names_of_targets(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", verb, "--help"])
    text = capsys.readouterr().out
    assert f"idlm plan {verb} configs/" in text and "v5p-N" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*DECODE, "v4e-8"], "unknown target 'v4e-8'"),
        ([*DECODE, "h100x8", "--batch", "0"], "must be at least 1"),
        ([*TRAIN, "v5e-16", "--mesh", "data=1,fdsp=8"], "did you mean 'fsdp'"),
        ([*TRAIN, "v5e-16", "--mesh", "tp=two"], "not 'two'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments)


def test_a_missing_compiler_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda _: None)
    assert "pip install 'idlm-jax[tpu]'" in refused(capsys, *DECODE, "v5e-16")


def test_meshes_are_named_as_in_configurations() -> None:
    assert parse_mesh("fsdp=8") == MeshSettings(1, 8, 1)
    assert parse_mesh("data=2,fsdp=-1,tp=4") == MeshSettings(2, -1, 4)
    with pytest.raises(UserError, match="at most one axis"):
        parse_mesh("data=-1,fsdp=-1")
