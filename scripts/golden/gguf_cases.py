"""Tiny GGUF files with the metadata a real one carries, and the logits of their de-quantised weights."""

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quant
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from golden.bpe import CHAT_TEMPLATE, build_tokenizer, encode_chat, encode_texts, vocabulary
from golden.common import forward, load, make_input_ids, randomise, write_json, write_tensors

LENGTH = 16
MESSAGES = [{"role": "user", "content": "hello world 12"}]
# A file is named <architecture>_<key>.gguf; values: types of the matrices and of the token embedding.
# Like the real SmolLM2 file, Q4_1 keeps its embedding in Q8_0.
LLAMA_TYPES = {
    "f32": (Quant.F32, Quant.F32),
    "q8_0": (Quant.Q8_0, Quant.Q8_0),
    "q4_0": (Quant.Q4_0, Quant.Q4_0),
    "q4_1": (Quant.Q4_1, Quant.Q8_0),
}
FILE_TYPE = {Quant.F32: 0, Quant.Q4_0: 2, Quant.Q4_1: 3, Quant.Q8_0: 7}
PRE = {"llama": "smollm", "qwen3": "qwen2"}
TENSOR_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# De-quantised tensors, in Hugging Face's row order, stored beside the logits.
KEPT = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
)


def build(architecture: str) -> PreTrainedModel:
    """A model whose row lengths are all multiples of 32, the block size of the quantised types."""
    shape = {
        "vocab_size": len(vocabulary()[0]),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if architecture == "llama":
        rope = {"rope_type": "default", "rope_theta": 1e5}
        config = LlamaConfig(**shape, rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters=rope)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e6}
        config = Qwen3Config(**shape, head_dim=16, tie_word_embeddings=False, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(model, seed=40 if architecture == "llama" else 41)
    return model


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k for `llama`: the two halves of each head interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute`."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def gguf_name(hf_name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    stem, suffix = hf_name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{TENSOR_NAMES[stem]}.{suffix}"
    layer, module = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{TENSOR_NAMES[module]}.{suffix}"


def add_metadata(writer: gguf.GGUFWriter, architecture: str, model: PreTrainedModel, quant: Quant) -> None:
    """The keys of a real file: llama as SmolLM2 has them, qwen3 with explicit head sizes and no vocab_size."""
    config, arch = model.config, architecture
    writer.add_string("general.type", "model")
    writer.add_string("general.name", f"Tiny {arch}")
    writer.add_uint32(f"{arch}.block_count", config.num_hidden_layers)
    writer.add_uint32(f"{arch}.context_length", config.max_position_embeddings)
    writer.add_uint32(f"{arch}.embedding_length", config.hidden_size)
    writer.add_uint32(f"{arch}.feed_forward_length", config.intermediate_size)
    writer.add_uint32(f"{arch}.attention.head_count", config.num_attention_heads)
    writer.add_uint32(f"{arch}.attention.head_count_kv", config.num_key_value_heads)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    if arch == "llama":
        writer.add_uint32("llama.vocab_size", config.vocab_size)
        writer.add_uint32("llama.rope.dimension_count", config.head_dim)
    else:
        writer.add_uint32(f"{arch}.attention.key_length", config.head_dim)
        writer.add_uint32(f"{arch}.attention.value_length", config.head_dim)
    writer.add_uint32("general.file_type", FILE_TYPE[quant])
    writer.add_uint32("general.quantization_version", 2)
    tokens, types, merges = vocabulary()
    writer.add_bool("tokenizer.ggml.add_space_prefix", False)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", PRE[arch])
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", types)
    writer.add_array("tokenizer.ggml.merges", merges)
    for key, value in {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
    writer.add_string("tokenizer.chat_template", CHAT_TEMPLATE)


def head_count(name: str, model: PreTrainedModel) -> int | None:
    """Heads whose rows llama.cpp permutes; none for other tensors and other architectures."""
    if model.config.model_type != "llama":
        return None
    counts = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    return counts.get(name.split(".")[-2])


def write_file(path: Path, architecture: str, types: tuple[Quant, Quant]) -> dict[str, torch.Tensor]:
    """Write one GGUF file; return its golden tensors."""
    model = build(architecture)
    matrix_type, embedding_type = types
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer, architecture, model, matrix_type)
    restored = {}
    for name, param in model.named_parameters():
        quant = embedding_type if "embed_tokens" in name else matrix_type
        quant = quant if param.ndim == 2 else Quant.F32
        weight, heads = param.detach().numpy(), head_count(name, model)
        data = gguf.quants.quantize(permute(weight, heads) if heads else weight, quant)
        writer.add_tensor(gguf_name(name), data, raw_dtype=quant)
        back = gguf.quants.dequantize(data, quant)
        restored[name] = torch.from_numpy((unpermute(back, heads) if heads else back).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(restored, strict=False)
    input_ids = make_input_ids(model.config.vocab_size, LENGTH)
    return {"input_ids": input_ids, "logits": forward(model, input_ids)} | {name: restored[name] for name in KEPT}


def check_with_transformers(path: Path, golden: dict[str, torch.Tensor], head_dim: int) -> None:
    """transformers' own GGUF reader must come to the same logits."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.head_dim = head_dim  # transformers does not read attention.key_length of qwen3
    model = load(path.parent, gguf_file=path.name, config=config)
    error = (forward(model, golden["input_ids"].long()) - golden["logits"]).abs().max().item()
    if error > 1e-4:
        raise AssertionError(f"{path.name}: transformers' logits differ by {error:.2e}")


def write_gguf_cases(out: Path) -> None:
    """Write `gguf/<name>.gguf`, `gguf/<name>.safetensors` and `gguf/tokenizer.json`."""
    folder = out / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    files = [("llama", key, types) for key, types in LLAMA_TYPES.items()]
    for architecture, key, types in [*files, ("qwen3", "f32", (Quant.F32, Quant.F32))]:
        path = folder / f"{architecture}_{key}.gguf"
        golden = write_file(path, architecture, types)
        check_with_transformers(path, golden, head_dim=8 if architecture == "llama" else 16)
        write_tensors(path.with_suffix(".safetensors"), golden)
    tokenizers = {}
    for pre in PRE.values():
        tokenizer = build_tokenizer(*vocabulary(), pre)
        chat = encode_chat(tokenizer, CHAT_TEMPLATE, MESSAGES)
        tokenizers[pre] = {"texts": encode_texts(tokenizer), "chat": chat}
    write_json(folder / "tokenizer.json", tokenizers)
