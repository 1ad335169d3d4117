"""Hugging Face directory → our Orbax checkpoint → Hugging Face directory: nothing changes."""

import filecmp
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlm_jax.backbone.weights import Weight, weight_table
from idlm_jax.checkpoint.hf import HFSource, find_tensors, write_hf
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.checkpoint.store import OrbaxSource, batches, write_orbax
from tests.checkpoint.hf_files import TINY, random_tensors, raw_bytes, write_checkpoint
from tests.support import GOLDEN

CHECKPOINTS = sorted(
    path.parent.name for path in GOLDEN.glob("*/config.json") if list(path.parent.glob("model*.safetensors"))
)
COMPANIONS = {
    "generation_config.json": '{"eos_token_id": 2}',
    "tokenizer.json": '{"not": "read here"}',
    "tokenizer_config.json": '{"chat_template": "é"}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}\n",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\na b\n",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "LICENSE": "do as you like",
    "modeling_sdar.py": "raise SystemExit('never run')",
}


def there_and_back(source: Path, work: Path, **options: Any) -> Path:
    """Convert to Orbax and export again."""
    write_orbax(open_source(source), work / "orbax")
    write_hf(open_source(work / "orbax"), work / "back", **options)
    return work / "back"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_golden_directory_returns_byte_for_byte(name: str, tmp_path: Path) -> None:
    back = there_and_back(GOLDEN / name, tmp_path)
    before, after = find_tensors(GOLDEN / name), find_tensors(back)
    assert before.keys() == after.keys()
    assert all(before[tensor].equals(after[tensor]) for tensor in before)
    same = ["config.json", "generation_config.json"]
    if (GOLDEN / name / "model.safetensors").exists():
        same.append("model.safetensors")  # the whole file: transformers wrote the original
    for file in same:
        assert filecmp.cmp(GOLDEN / name / file, back / file, shallow=False), file


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[str, ...], int]:
    """A tiny config of any family, the dtypes of its tensors, and a number of shards (0: one file)."""
    family = draw(st.sampled_from(["qwen3", "sdar", "qwen2", "llama"]))
    kv_heads = draw(st.integers(1, 2))
    hf = {
        **TINY,
        "model_type": family,
        "vocab_size": draw(st.integers(3, 40)),
        "hidden_size": draw(st.integers(1, 16)),
        "intermediate_size": draw(st.integers(1, 24)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 4)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
    }
    dtypes = draw(st.lists(st.sampled_from(["bfloat16", "float16", "float32"]), min_size=1, max_size=3))
    return hf, tuple(dtypes), draw(st.sampled_from([0, 1, 3]))


@settings(max_examples=20, deadline=None)
@given(checkpoints(), st.sampled_from(["5GB", 400]))
def test_any_checkpoint_returns_byte_for_byte(
    checkpoint: tuple[dict[str, Any], tuple[str, ...], int], shard_size: str | int
) -> None:
    hf, dtypes, shards = checkpoint
    tensors = random_tensors(hf, dtypes)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = write_checkpoint(work / "source", hf, tensors, shards)
        back = there_and_back(source, work, max_shard_size=shard_size)
        assert json.loads((back / "config.json").read_text()) == hf
        found = {tensor: stored.read() for tensor, stored in find_tensors(back).items()}
    assert found.keys() == tensors.keys()
    for tensor, array in tensors.items():
        assert found[tensor].dtype == array.dtype and found[tensor].shape == array.shape
        assert raw_bytes(found[tensor]) == raw_bytes(array), tensor


def test_companion_files_travel_unchanged(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", TINY)
    for name, text in COMPANIONS.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    (source / "optimizer.pt").write_text("stays behind")
    back = there_and_back(source, tmp_path)
    for name in ("config.json", *COMPANIONS):
        assert filecmp.cmp(source / name, back / name, shallow=False), name
        assert filecmp.cmp(source / name, tmp_path / "orbax" / name, shallow=False), name
    assert not (back / "optimizer.pt").exists()
    assert {path.name for path in back.iterdir()} >= {"README.md", "model.safetensors"}


def test_orbax_source_reads_what_the_hugging_face_source_reads(tmp_path: Path) -> None:
    source = HFSource(GOLDEN / "qwen3_bf16")
    write_orbax(source, tmp_path / "orbax")
    ours = open_source(tmp_path / "orbax")
    assert isinstance(ours, OrbaxSource) and ours.config == source.config and ours.hf_config == source.hf_config
    for weight in weight_table(source.config):
        array = ours.read(weight)
        assert array.dtype == ours.stored_dtype(weight) == source.stored_dtype(weight)
        assert array.shape == weight.shape
        assert raw_bytes(array) == raw_bytes(source.read(weight))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_load_params_is_the_same_from_either_source(dtype: str | None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(array.shape).astype(array.dtype)
        for name, array in random_tensors(TINY, ("float16", "bfloat16", "float32")).items()
    }
    source = HFSource(write_checkpoint(tmp_path / "hf", TINY, tensors))
    write_orbax(source, tmp_path / "orbax")
    wanted = None if dtype is None else jnp.dtype(dtype)
    ours, theirs = load_params(open_source(tmp_path / "orbax"), wanted), load_params(source, wanted)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and (dtype is None or a.dtype == wanted)
        assert raw_bytes(np.asarray(a)) == raw_bytes(np.asarray(b))


def test_sharding_decides_where_each_weight_goes() -> None:
    source = HFSource(GOLDEN / "qwen3_tied")
    asked = []

    def place(weight: Weight) -> jax.sharding.Sharding:
        asked.append(weight.path)
        return jax.sharding.SingleDeviceSharding(jax.devices()[-1])

    placed, plain = load_params(source, sharding=place), load_params(source)
    assert asked == [weight.path for weight in weight_table(source.config)]
    jax.tree.map(np.testing.assert_array_equal, placed, plain)
    assert all(leaf.devices() == {jax.devices()[-1]} for leaf in jax.tree.leaves(placed))


def test_cast_is_written_into_tensors_and_config(tmp_path: Path) -> None:
    source = HFSource(GOLDEN / "qwen3_tied")
    bfloat16 = HFSource(GOLDEN / "qwen3_bf16").stored_dtype(weight_table(source.config)[0])
    write_orbax(source, tmp_path / "orbax", bfloat16, mask_token_id=7)
    write_hf(source, tmp_path / "hf", bfloat16)
    for path in (tmp_path / "orbax", tmp_path / "hf"):
        written = open_source(path)
        assert written.hf_config["dtype"] == "bfloat16"
        for weight in weight_table(source.config):
            expected = source.read(weight).astype(bfloat16)
            assert raw_bytes(written.read(weight)) == raw_bytes(expected)
    assert open_source(tmp_path / "orbax").config.mask_token_id == 7


def test_tied_head_stored_as_well_is_dropped(tmp_path: Path) -> None:
    hf = {**TINY, "tie_word_embeddings": True}
    tensors = random_tensors(hf)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.rotary_emb.inv_freq": np.ones(2, "f4"),
    }
    back = there_and_back(write_checkpoint(tmp_path / "source", hf, tensors | extra), tmp_path)
    assert find_tensors(back).keys() == tensors.keys()


def test_shards_keep_to_their_size_and_the_index_is_complete(tmp_path: Path) -> None:
    write_hf(HFSource(GOLDEN / "qwen3_untied"), tmp_path / "hf", max_shard_size="40KB")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "hf").glob("*.safetensors")}
    assert len(files) > 1 and set(index["weight_map"].values()) == files
    assert all(os.path.getsize(tmp_path / "hf" / file) < 40_000 + 4_000 for file in files)
    assert index["metadata"]["total_size"] == sum(
        4 * weight.size for weight in weight_table(HFSource(GOLDEN / "qwen3_untied").config)
    )


def test_batches_hold_every_tensor_once_and_keep_to_the_limit() -> None:
    weights = weight_table(HFSource(GOLDEN / "qwen3_untied").config)
    for limit in (1, 5_000, 20_000, 10**9):
        cut = list(batches(weights, lambda weight: 4 * weight.size, limit))
        assert [weight for batch in cut for weight in batch] == weights
        assert all(len(batch) == 1 or sum(4 * weight.size for weight in batch) <= limit for batch in cut)


@pytest.mark.torch
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_computes_the_same_from_the_exported_directory(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    if name == "sdar":
        pytest.skip("transformers does not know the model_type")
    back = there_and_back(GOLDEN / name, tmp_path, max_shard_size="60KB")
    tokens = torch.arange(20)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (GOLDEN / name, back)]
    assert torch.equal(*logits)


def test_devices_get_their_parts_of_a_tensor_and_the_rest_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, TINY, {name: np.nan_to_num(array) for name, array in random_tensors(TINY).items()})
    source = HFSource(tmp_path)
    wholes = {weight.path: source.read(weight) for weight in weight_table(source.config)}
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        type(next(iter(source._tensors.values()))), "read", lambda self: pytest.fail("the whole is read")
    )
    for weight in weight_table(source.config):
        ends = [sorted(rng.integers(0, size + 1, 2)) for size in weight.shape]
        for index in (tuple(slice(*end) for end in ends), tuple(slice(None) for _ in ends)):
            assert raw_bytes(source.read_part(weight, index)) == raw_bytes(wholes[weight.path][index])
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for dtype in (None, jnp.bfloat16, jnp.float32):
        params = load_params(source, dtype, lambda weight: device)
        for weight in weight_table(source.config):
            ours = params
            for key in weight.path.split("."):
                ours = ours[int(key) if key.isdecimal() else key]
            expected = wholes[weight.path].astype(dtype or wholes[weight.path].dtype)
            np.testing.assert_array_equal(np.asarray(ours, np.float32), expected.astype(np.float32))
