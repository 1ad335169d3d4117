"""Adapters that come with the package: found by name, and fit to be shipped."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from idlm_jax.checkpoint import shipped
from idlm_jax.checkpoint.fetch import MODELS
from idlm_jax.checkpoint.open import open_source
from idlm_jax.checkpoint.peft import load_adapter
from idlm_jax.config import ModelConfig, load_yaml
from idlm_jax.errors import UserError
from tests.support import GOLDEN

CONFIG = open_source(GOLDEN / "qwen3_tied").config
SMOLLM2 = Path(__file__).parents[2] / "configs" / "models" / "smollm2-135m.yaml"


@pytest.fixture
def shipped_golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of shipped adapters, in which a golden one has the name smollm2-n4."""
    monkeypatch.setattr(shipped, "ADAPTERS", tmp_path / "adapters")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "peft_r8", tmp_path / "adapters" / "smollm2_n4")
    return tmp_path / "adapters"


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        load_adapter(name, CONFIG)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_is_its_directory(shipped_golden: Path) -> None:
    by_name, by_path = (load_adapter(where, CONFIG) for where in ("smollm2-n4", shipped_golden / "smollm2_n4"))
    assert by_name.config == by_path.config
    jax.tree.map(np.testing.assert_array_equal, by_name.params, by_path.params)


def test_a_directory_of_the_same_name_comes_first(shipped_golden: Path) -> None:
    shutil.copytree(GOLDEN / "peft_qv_r4", "smollm2-n4")
    assert load_adapter("smollm2-n4", CONFIG).config.rank == 4


@pytest.mark.parametrize("name", ["smollm2-n3", "smollm2_n4", "smolm2-n4"])
def test_a_name_that_is_nearly_right_is_told_the_right_one(name: str, shipped_golden: Path) -> None:
    assert refusal(name).startswith(f"{name}: no such") and "did you mean 'smollm2-n4'?" in refusal(name)


def test_other_words_are_paths_or_hub_ids() -> None:
    assert shipped.shipped_directory("runs/smollm2-n4") is None
    assert shipped.shipped_directory("checkpoints") is None


def test_an_installation_without_the_weights_says_so(shipped_golden: Path) -> None:
    assert shipped.is_installed("smollm2-n4")
    (shipped_golden / "smollm2_n4" / "adapter_model.safetensors").unlink()
    assert not shipped.is_installed("smollm2-n4")
    assert "came without the adapter" in refusal("smollm2-n4")


@pytest.mark.skipif(
    not shipped.is_installed("smollm2-n4"), reason="the adapter smollm2-n4 is not part of this checkout"
)
def test_the_adapter_of_smollm2_fits_is_small_and_names_no_machine() -> None:
    adapter = load_adapter("smollm2-n4", ModelConfig.from_hf(load_yaml(SMOLLM2)))
    assert adapter.config.mask_token_id == MODELS["smollm2"].mask_token_id
    assert adapter.config.rank <= 32 and "mask_embedding" in adapter.params
    directory = shipped.ADAPTERS / "smollm2_n4"
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 20e6
    settings = json.loads((directory / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = (directory / "README.md").read_text()
    assert "Apache-2.0" in card and "idlm train" in card and "synthesize" in card
