"""GGUF files: weights, config and errors (golden files of scripts/make_golden.py and files written here)."""

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.backbone.weights import Weight, weight_table
from idlm_jax.checkpoint.gguf import GGUFSource, gguf_name
from idlm_jax.checkpoint.gguf_header import read_header
from idlm_jax.checkpoint.hf import HFSource
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.config import RopeConfig
from idlm_jax.errors import UserError
from tests.checkpoint.gguf_files import from_huggingface, metadata_of, tensors_of, write_gguf
from tests.support import GOLDEN, relative_error

FILES = sorted(path.stem for path in (GOLDEN / "gguf").glob("*.gguf"))
# Golden checkpoints that together have biases, both head kinds, each RoPE that GGUF carries, and each architecture.
CONVERTED = ["llama_untied_bias", "llama_rope_linear", "qwen2_tied", "qwen2_untied", "qwen3_rope_yarn", "qwen3_untied"]
# Each type that the library de-quantises; K-quants come in blocks of 256.
TYPES = [
    *(Quant.F32, Quant.F16, Quant.BF16, Quant.Q4_0, Quant.Q4_1, Quant.Q5_0, Quant.Q5_1, Quant.Q8_0),
    *(Quant.Q2_K, Quant.Q3_K, Quant.Q4_K, Quant.Q5_K, Quant.Q6_K, Quant.IQ4_NL, Quant.IQ4_XS),
]
# One layer whose rows are as long as the blocks of K-quants.
WIDE: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
LLAMA = GOLDEN / "gguf" / "llama_q4_1.gguf"


def _logits(source: GGUFSource, tokens: np.ndarray) -> np.ndarray:
    model = Qwen3(source.config, load_params(source, jnp.float32))
    return np.asarray(jax.jit(causal_logits)(model, jnp.asarray(tokens)))


def _table(source: GGUFSource) -> dict[str, Weight]:
    return {weight.hf_name: weight for weight in weight_table(source.config)}


def _in_hf_layout(source: GGUFSource, weight: Weight) -> np.ndarray:
    array = source.read(weight)
    return array.T if weight.transpose else array


@pytest.mark.parametrize("name", FILES)
def test_logits_equal_those_of_the_dequantised_model(name: str) -> None:
    golden = load_file(GOLDEN / "gguf" / f"{name}.safetensors")
    source = open_source(GOLDEN / "gguf" / f"{name}.gguf")
    assert relative_error(_logits(source, golden["input_ids"]), golden["logits"]) < 2e-4


@pytest.mark.parametrize("name", FILES)
def test_tensors_equal_the_dequantised_ones_bit_for_bit(name: str) -> None:
    golden = load_file(GOLDEN / "gguf" / f"{name}.safetensors")
    source = GGUFSource(GOLDEN / "gguf" / f"{name}.gguf")
    kept = [weight for name, weight in _table(source).items() if name in golden]
    assert kept
    for weight in kept:
        np.testing.assert_array_equal(_in_hf_layout(source, weight), golden[weight.hf_name])


@pytest.mark.parametrize("case", CONVERTED)
def test_every_architecture_bias_and_rope_survives_gguf(case: str, tmp_path: Path) -> None:
    golden = load_file(GOLDEN / case / "golden.safetensors")
    source, original = GGUFSource(from_huggingface(GOLDEN / case, tmp_path / "m.gguf")), HFSource(GOLDEN / case)
    for weight in weight_table(original.config):
        np.testing.assert_array_equal(source.read(weight), original.read(weight))
    assert relative_error(_logits(source, golden["input_ids"]), golden["logits"]) < 2e-4


def _wide_tensors(quant: Quant, vocabulary: int) -> dict[str, tuple[np.ndarray, Quant]]:
    """Random bytes of a type as the tensors of WIDE; norms in float32."""
    rng = np.random.default_rng(quant.value)
    elements, size = gguf.GGML_QUANT_SIZES[quant]
    width, mlp = WIDE["hidden_size"], WIDE["intermediate_size"]
    shapes = {"token_embd.weight": (vocabulary, width), "blk.0.attn_q.weight": (2 * width, width)}
    shapes |= {"blk.0.attn_output.weight": (width, 2 * width), "blk.0.ffn_down.weight": (width, mlp)}
    shapes |= {f"blk.0.{name}.weight": (width, width) for name in ("attn_k", "attn_v")}
    shapes |= {f"blk.0.{name}.weight": (mlp, width) for name in ("ffn_gate", "ffn_up")}
    tensors = {
        name: (rng.integers(0, 256, (rows, columns // elements * size), np.uint8), quant)
        for name, (rows, columns) in shapes.items()
    }
    norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm", "blk.0.attn_q_norm", "blk.0.attn_k_norm")
    return tensors | {f"{name}.weight": (np.ones(width, np.float32), Quant.F32) for name in norms}


@pytest.mark.parametrize("quant", TYPES, ids=lambda quant: quant.name)
def test_each_type_is_read_as_the_library_dequantises_it(quant: Quant, tmp_path: Path) -> None:
    tensors = _wide_tensors(quant, vocabulary=40)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", "qwen3", metadata_of(WIDE), tensors))
    for weight in weight_table(source.config):
        stored, kind = tensors[gguf_name(weight.hf_name)]
        with np.errstate(all="ignore"):  # random bytes also mean NaN and infinity
            array = _in_hf_layout(source, weight)
            assert array.dtype == source.stored_dtype(weight)
            assert source.stored_type(weight) == kind.name
            np.testing.assert_array_equal(array.astype(np.float32), gguf.quants.dequantize(stored, kind))


def test_reading_a_tensor_needs_less_than_three_times_its_size(tmp_path: Path) -> None:
    tensors = _wide_tensors(Quant.Q8_0, vocabulary=1 << 16)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", "qwen3", metadata_of(WIDE), tensors))
    embedding = weight_table(source.config)[0]
    tracemalloc.start()
    with np.errstate(all="ignore"):
        size = source.read(embedding).nbytes
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == 1 << 26
    assert peak < 3 * size


def test_floating_point_types_keep_their_dtype(tmp_path: Path) -> None:
    tensors = tensors_of(GOLDEN / "qwen3_tied")
    halves = {
        name: (array.astype(np.float16), Quant.F16) if array.ndim == 2 else (array, Quant.F32)
        for name, (array, _) in tensors.items()
    }
    metadata = GGUFSource(from_huggingface(GOLDEN / "qwen3_tied", tmp_path / "full.gguf")).metadata
    source = GGUFSource(write_gguf(tmp_path / "half.gguf", "qwen3", _own_keys(metadata), halves))
    table = _table(source)
    assert source.stored_dtype(table["model.embed_tokens.weight"]) == np.float16
    assert source.stored_dtype(table["model.norm.weight"]) == np.float32
    assert source.hf_config["torch_dtype"] == "float16"
    np.testing.assert_array_equal(source.read(table["model.embed_tokens.weight"]), halves["token_embd.weight"][0])


@pytest.mark.parametrize("name", FILES)
def test_our_header_reader_sees_what_the_library_sees(name: str) -> None:
    path = GOLDEN / "gguf" / f"{name}.gguf"
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    tensors = {t.name: (tuple(t.shape.tolist()[::-1]), t.tensor_type, t.data_offset) for t in theirs.tensors}
    assert {e.name: (e.shape, e.type_id, e.offset) for e in ours.tensors.values()} == tensors


def test_config_is_what_the_metadata_says() -> None:
    config = GGUFSource(LLAMA).config
    assert (config.family, config.vocab_size, config.head_dim, config.num_key_value_heads) == ("llama", 280, 8, 2)
    assert config.rope == RopeConfig(theta=1e5)
    assert config.rms_norm_eps == 1e-5  # a float32 in the file, meant as this decimal
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert not GGUFSource(GOLDEN / "gguf" / "qwen3_f32.gguf").config.tie_word_embeddings


def test_every_end_of_text_and_the_mask_token_are_taken_over(tmp_path: Path) -> None:
    metadata = _metadata() | {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.mask_token_id": 3}
    config = GGUFSource(write_gguf(tmp_path / "m.gguf", "llama", metadata, _tensors())).config
    assert config.eos_token_ids == (2, 0)
    assert config.mask_token_id == 3


# Bad input


def _own_keys(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != "general.architecture"}


def _metadata() -> dict[str, Any]:
    return _own_keys(read_header(LLAMA).metadata)


def _tensors() -> dict[str, tuple[np.ndarray, Quant]]:
    return {t.name: (np.array(t.data), t.tensor_type) for t in gguf.GGUFReader(LLAMA).tensors}


def _refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        GGUFSource(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@settings(deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = LLAMA.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "m.gguf"
    path.write_bytes(whole[: int(share * len(whole))])
    assert "GGUF" in _refusal(path)


@settings(deadline=None)
@given(data=st.data())
def test_damaged_headers_are_refused_or_read_but_never_crash(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = bytearray(LLAMA.read_bytes())
    header_end = min(entry.offset for entry in read_header(LLAMA).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    path.write_bytes(whole)
    try:
        source = GGUFSource(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        for weight in weight_table(source.config):
            assert source.read(weight).shape == weight.shape


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "does not begin with 'GGUF'"),
        (b"PK\x03\x04 a zip file", "does not begin with 'GGUF'"),
        (b"GGUF\x00\x00\x00\x03", "big-endian"),
        (b"GGUF\x01\x00\x00\x00", "version 1"),
    ],
)
def test_files_that_are_not_gguf_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert words in _refusal(path)
    assert "cannot read" in _refusal(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention.head_count": 0}, "attention.head_count"),
        ({"attention.head_count_kv": [2, 2]}, "a list of 2"),
        ({"attention.sliding_window": 64}, "sliding_window"),
        ({"attention.value_length": 4}, "value_length"),
        ({"rope.dimension_count": 4}, "rope.dimension_count"),
        ({"rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"rope.scaling.type": "linear"}, "rope.scaling.factor"),
        ({"expert_count": 8}, "expert_count"),
        ({"block_count": 3}, "missing tensors: blk.2.attn_norm.weight"),
        ({"block_count": 2**31}, "says 2147483648 layers"),
        ({"block_count": 1}, "tensors that a llama model does not have: blk.1."),
        ({"feed_forward_length": 32}, "has shape (64, 32), expected (32, 32)"),
    ],
)
def test_metadata_that_this_backbone_does_not_compute_is_named(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    metadata = _metadata() | {f"llama.{key}": value for key, value in changes.items()}
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata, _tensors())
    assert words in _refusal(path)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "gemma3", _metadata(), _tensors())
    assert "architecture 'gemma3' is not supported (supported: llama, qwen2, qwen3)" in _refusal(path)


def test_wrong_tensors_are_named(tmp_path: Path) -> None:
    tensors = _tensors()
    misspelt = {name.replace("blk.1.ffn_up", "blk.1.ffn_pu"): value for name, value in tensors.items()}
    message = _refusal(write_gguf(tmp_path / "a.gguf", "llama", _metadata(), misspelt))
    assert "missing tensors: blk.1.ffn_up.weight; did you mean 'blk.1.ffn_pu.weight'?" in message
    frequencies = tensors | {"rope_freqs.weight": (np.ones(4, np.float32), Quant.F32)}
    assert "Llama 3" in _refusal(write_gguf(tmp_path / "b.gguf", "llama", _metadata(), frequencies))
    integers = tensors | {"output_norm.weight": (np.ones(32, np.int32), Quant.I32)}
    assert "I32" in _refusal(write_gguf(tmp_path / "c.gguf", "llama", _metadata(), integers))


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(UserError, match=r"pip install 'idlm-jax\[gguf\]'"):
        GGUFSource(LLAMA)
