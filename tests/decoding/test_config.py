"""Decode files: the official ones load, lossy values are refused by name, mistakes get a suggestion."""

from pathlib import Path

import pytest

from idlm_jax.decoding.config import DecodeConfig, load_decode_config
from idlm_jax.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "decode"
STRIDES = (2, 3, 4, 5, 8, 16)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "decode.yaml"
    path.write_text(text)
    return path


def official(stride: int) -> str:
    """What the official repository ships for a stride."""
    return (
        f"block_size: {2 * stride - 1}\ngen_block_size: {stride}\nconfidence_threshold: 0.0\n"
        "temperature: 1.0\ntop_k: 50\ntop_p: 0.95\nuse_spec_verify: true\n"
    )


@pytest.mark.parametrize("stride", STRIDES)
def test_official_files_load_unchanged_and_ours_mean_the_same(stride: int, tmp_path: Path) -> None:
    expected = DecodeConfig(stride, "branch", "gumbel", True, 1.0, 50, 0.95)
    assert load_decode_config(write(tmp_path, official(stride))) == expected
    assert load_decode_config(CONFIGS / f"isd_n{stride}.yaml") == expected


def test_every_shipped_file_is_covered() -> None:
    assert sorted(path.name for path in CONFIGS.iterdir()) == sorted(f"isd_n{stride}.yaml" for stride in STRIDES)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("confidence_threshold: 0.5", "'confidence_threshold: 0.5' would let drafts through"),
        ("use_spec_verify: false", "'use_spec_verify: false' would accept drafts without verifying"),
        ("verify_alpha: 0.5", "'verify_alpha: 0.5' would accept drafts with another probability"),
        ("verify_alpha: 0", "only 1.0 is exact"),
        ("fast_verify: true", "'fast_verify: true' would accept any draft among the top logits"),
        ("output_correction: true", "'output_correction: true' would emit another token"),
        ("causal_prefill: false", "'causal_prefill: false' would let prompt tokens see"),
        ("verify_num_specs: 1", "'verify_num_specs: 1' would accept the drafts after those"),
        ("fast_verify_topk: 5", "'fast_verify_topk' tunes a lossy verification"),
        ("fast_verify_topk_per_spec: [5, 5]", "'fast_verify_topk_per_spec' tunes a lossy"),
        ("confidence_accept_threshold: 0.9", "'confidence_accept_threshold' tunes a lossy"),
    ],
)
def test_lossy_settings_are_refused_by_name_with_their_effect(line: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"gen_block_size: 4\n{line}\n")
    with pytest.raises(UserError) as error:
        load_decode_config(path)
    assert said in str(error.value) and str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "line",
    [
        "verify_alpha: 1",
        "fast_verify: false",
        "output_correction: false",
        "causal_prefill: true",
        "verify_num_specs: 3",
        "conditional_lora: true",
    ],
)
def test_exact_values_of_official_keys_change_nothing(line: str, tmp_path: Path) -> None:
    assert load_decode_config(write(tmp_path, f"gen_block_size: 4\n{line}\n")) == DecodeConfig()


KEYS = ["stride", "layout", "coupling", "gated", "temperature", "top_k", "top_p", "gen_block_size", "conditional_lora"]
KEYS += ["block_size", "confidence_threshold", "use_spec_verify", "verify_alpha", "verify_num_specs", "fast_verify"]
KEYS += ["output_correction", "causal_prefill", "kernels"]


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_key_gets_a_suggestion(key: str, tmp_path: Path) -> None:
    wrong = key + "s"
    with pytest.raises(UserError, match=f"unknown key '{wrong}'; did you mean '{key}'"):
        load_decode_config(write(tmp_path, f"{wrong}: 1\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stride: 0", "stride must be in 1 … 16, not 0"),
        ("gen_block_size: 17", "stride must be in 1 … 16, not 17"),
        ("stride: 2.5", "'stride' must be of type int, not 2.5"),
        ("gen_block_size: true", "'gen_block_size' must be of type int, not true"),
        ("gen_block_size: four", "'gen_block_size' must be of type int, not \"four\""),
        ("gen_block_size: 4\nstride: 3", "'gen_block_size' and 'stride' mean the same"),
        ("stride: 3\ngen_block_size: 4", "'gen_block_size' and 'stride' mean the same"),
        ("block_size: 8", "'block_size' must be 7 at stride 4, not 8"),
        ("layout: brunch", "unknown layout 'brunch' (one of standard, branch); did you mean 'branch'?"),
        ("coupling: gumble", "unknown coupling 'gumble' (one of gumbel, ratio); did you mean 'gumbel'?"),
        ("kernels: xal", "unknown kernels 'xal' (one of auto, xla); did you mean 'xla'?"),
        ("gated: 1", "'gated' must be of type bool, not 1"),
        ("temperature: -1", "temperature must be finite and not negative, not -1.0"),
        ("temperature: .nan", "temperature must be finite"),
        ("temperature: hot", "'temperature' must be of type float"),
        ("top_p: 0", "top_p must be in (0, 1], not 0.0"),
        ("top_p: 1.5", "top_p must be in (0, 1], not 1.5"),
        ("top_k: -5", "top_k must be positive and below 2^31, or 0 for off, not -5"),
        ("7: 1", "unknown key '7'"),
        ("- stride", "expected a mapping"),
        ("stride: [", "not valid YAML"),
    ],
)
def test_bad_files_are_refused_in_one_line_that_names_the_file(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_decode_config(path)
    assert said in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_decode_config(tmp_path / "nowhere.yaml")
