"""Every broken checkpoint and every impossible target gives one clear line and leaves nothing behind."""

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from idlm_jax.backbone.weights import weight_table
from idlm_jax.checkpoint import atomic, open, store
from idlm_jax.checkpoint.hf import HFSource, write_hf
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.checkpoint.source import find_mask_token
from idlm_jax.checkpoint.store import write_orbax
from idlm_jax.errors import UserError
from tests.checkpoint.hf_files import TINY, random_tensors, write_checkpoint, write_tensors
from tests.support import GOLDEN

HF = GOLDEN / "qwen3_untied"


def copy(name: str, target: Path) -> Path:
    """A golden checkpoint that a test may break."""
    return Path(shutil.copytree(GOLDEN / name, target / name))


def truncate(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def refuses(pattern: str, act: Callable[[], object]) -> None:
    """``act`` raises UserError with one line that matches."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(pattern, message), message


# Hugging Face directories


def test_missing_tensors_are_named_with_the_nearest_that_is_there(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    tensors["model.layers.0.self_attn.q_proj.weights"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    path = write_checkpoint(tmp_path / "hf", TINY, tensors)
    refuses(
        r"missing 1 tensor \(model\.layers\.0\.self_attn\.q_proj\.weight\) of 25; "
        r"it has 'model\.layers\.0\.self_attn\.q_proj\.weights' instead",
        lambda: open_source(path),
    )


def test_extra_tensors_are_named(tmp_path: Path) -> None:
    tensors = random_tensors(TINY) | {f"model.layers.7.norm{i}.weight": np.ones(2, "f4") for i in range(5)}
    path = write_checkpoint(tmp_path / "hf", TINY, tensors)
    refuses(r"5 tensors \(model\.layers\.7\.norm0\.weight, .*, …\) not in a qwen3 model", lambda: open_source(path))


def test_wrong_shape_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "hf", {**TINY, "intermediate_size": 21}, random_tensors(TINY))
    refuses(r"gate_proj\.weight has shape \[20, 12\], config\.json asks for \[21, 12\]", lambda: open_source(path))


def test_unsupported_dtype_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(TINY)
    tensors["model.norm.weight"] = np.ones(12, np.int8)
    path = write_checkpoint(tmp_path / "hf", TINY, tensors)
    refuses(
        r"model\.norm\.weight has dtype I8, which is not supported \(supported: F32, F16, BF16\)",
        lambda: open_source(path),
    )


def test_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    hf = {**TINY, "tie_word_embeddings": True}
    tensors = random_tensors(hf)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    path = write_checkpoint(tmp_path / "hf", hf, tensors)
    refuses(r"lm_head\.weight differs from model\.embed_tokens\.weight", lambda: open_source(path))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_truncated_safetensors_is_refused(keep: float, tmp_path: Path) -> None:
    path = copy("qwen3_untied", tmp_path)
    truncate(path / "model.safetensors", keep)
    refuses(r"model\.safetensors: damaged or truncated \(.*\); download or copy it again", lambda: open_source(path))


def test_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = copy("qwen3_untied", tmp_path)
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuses("Git LFS pointer", lambda: open_source(path))
    (path / "model.safetensors").write_bytes(os.urandom(4096))
    refuses("damaged or truncated", lambda: open_source(path))


def test_file_that_shrinks_after_opening_is_refused(tmp_path: Path) -> None:
    source = open_source(copy("qwen3_untied", tmp_path))
    truncate(source.path / "model.safetensors", 0.5)
    refuses("shorter than its header says", lambda: load_params(source))


def test_index_that_names_absent_files_or_tensors_is_refused(tmp_path: Path) -> None:
    path = copy("qwen3_sharded", tmp_path)
    index = path / "model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].update({"model.ghost.weight": "model-00001-of-00004.safetensors"}))
    refuses(r"no file holds 1 tensor \(model\.ghost\.weight\) of the index", lambda: open_source(path))
    (path / "model-00002-of-00004.safetensors").unlink()
    refuses(
        r"the index names 1 file \(model-00002-of-00004\.safetensors\) that does not exist", lambda: open_source(path)
    )
    index.write_text('{"weight_map": {"a": ')
    refuses(r"index\.json: not valid JSON", lambda: open_source(path))
    index.write_text('{"weights": {}}')
    refuses(r"no 'weight_map'", lambda: open_source(path))


def test_bad_config_is_refused(tmp_path: Path) -> None:
    path = copy("qwen3_untied", tmp_path)
    edit_json(path / "config.json", lambda data: data.update(model_type="qwen33"))
    refuses(r"model_type 'qwen33' is not supported .* did you mean 'qwen3'\?", lambda: open_source(path))
    (path / "config.json").write_text("{")
    refuses(r"config\.json: not valid JSON", lambda: open_source(path))
    (path / "config.json").write_text("[]")
    refuses("expected a JSON object", lambda: open_source(path))


def test_directories_without_weights_say_what_they_hold(tmp_path: Path) -> None:
    path = copy("qwen3_untied", tmp_path)
    weights = path / "model.safetensors"
    weights.rename(path / "pytorch_model.bin")
    refuses(r"PyTorch \.bin weights: load and save them once with transformers", lambda: open_source(path))
    (path / "pytorch_model.bin").rename(path / "adapter_model.safetensors")
    refuses("PEFT adapter", lambda: open_source(path))
    (path / "adapter_model.safetensors").rename(path / "consolidated.safetensors")
    refuses(r"no model\.safetensors .*found consolidated\.safetensors", lambda: open_source(path))
    refuses("no checkpoint here", lambda: open_source(tmp_path))


# Paths and Hub ids


def test_mistyped_path_suggests_its_neighbour() -> None:
    refuses(
        r"no such file or directory; did you mean '.*qwen3_untied'\?", lambda: open_source(f"{GOLDEN}/qwen3_untide")
    )


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*arguments: object, **options: object) -> None:
        raise LocalEntryNotFoundError("a long story\nin several lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refuses(
        "^nobody/nothing: no such directory, and the Hugging Face Hub cannot be reached",
        lambda: open_source("nobody/nothing"),
    )


def test_hub_id_is_downloaded_without_code_or_pytorch_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(HF)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_source("some/model").path == HF
    assert asked["name"] == "some/model" and not {"*.bin", "*.py", "*.pt"} & set(asked["patterns"])
    assert asked["patterns"] == list(open.HUB_PATTERNS)


# Our own checkpoints


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "orbax"
    write_orbax(HFSource(HF), path)
    return path


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "changed"])
def test_every_damaged_file_of_an_orbax_checkpoint_is_noticed(
    damage: str, converted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(converted, tmp_path / "orbax"))
    for file in [file for file in (path / "params").rglob("*") if file.is_file() and file.stat().st_size]:
        original = file.read_bytes()
        changed = bytearray(original)
        changed[len(original) // 2] ^= 1
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes({"truncated": original[:-1], "empty": b"", "changed": bytes(changed)}[damage])
        refuses(r"orbax: damaged or incomplete \(.*\); convert the model again", lambda: load_params(open_source(path)))
        file.write_bytes(original)
    load_params(open_source(path))
    assert capfd.readouterr().err == ""


def test_changed_bit_in_a_large_tensor_is_noticed(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_SMALL_FILE_BYTES", 0)  # as if every file were too large to be checked whole
    path = tmp_path / "orbax"
    write_orbax(HFSource(HF), path)
    data = max((file for file in (path / "params").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.write_bytes(changed)
    refuses("checksum of .* differs", lambda: load_params(open_source(path)))


def test_orbax_checkpoint_of_another_shape_or_version_is_refused(converted: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(converted, tmp_path / "orbax"))
    edit_json(path / "config.json", lambda data: data.update(intermediate_size=65))
    refuses(r"layers\.0\.mlp\.gate_proj\.kernel has shape \[32, 64\]", lambda: open_source(path))
    edit_json(path / "config.json", lambda data: data.update(intermediate_size=64, num_hidden_layers=3))
    refuses(r"layers\.2\.\S+ is missing", lambda: open_source(path))
    edit_json(path / "config.json", lambda data: data.update(num_hidden_layers=1))
    refuses(r"layers\.1\.\S+ is not in a model of this config", lambda: open_source(path))
    edit_json(path / "idlm.json", lambda data: data.update(format_version=99))
    refuses("format version 99 is newer", lambda: open_source(path))
    (path / "idlm.json").write_text("{}")
    refuses("not a checkpoint of idlm_jax", lambda: open_source(path))


def test_checksums_are_those_of_the_tensors(converted: Path) -> None:
    source = HFSource(HF)
    checksums = json.loads((converted / "idlm.json").read_text())["crc32"]
    expected = {w.path: zlib.crc32(np.ascontiguousarray(source.read(w)).tobytes()) for w in weight_table(source.config)}
    assert checksums == expected


# Targets


WRITERS = pytest.mark.parametrize("write", [write_orbax, write_hf])


@WRITERS
def test_existing_target_is_refused_unless_overwritten(write: Callable, tmp_path: Path) -> None:
    target = tmp_path / "target"
    write(HFSource(HF), target)
    refuses(r"target exists already; give another target, or --overwrite", lambda: write(HFSource(HF), target))
    (target / "old").write_text("goes")
    write(HFSource(HF), target, overwrite=True)
    assert not (target / "old").exists()
    load_params(open_source(target))
    assert os.listdir(tmp_path) == ["target"]


@WRITERS
def test_overwrite_spares_what_is_no_checkpoint_and_the_source_itself(write: Callable, tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("precious")
    refuses("does not hold a checkpoint", lambda: write(HFSource(HF), documents, overwrite=True))
    assert (documents / "thesis.txt").read_text() == "precious"
    source = copy("qwen3_untied", tmp_path)
    refuses("holds the source itself", lambda: write(HFSource(source), source, overwrite=True))
    refuses("exists already", lambda: write(HFSource(HF), documents / "thesis.txt"))
    load_params(open_source(source))


@WRITERS
def test_full_disk_is_noticed_before_anything_is_written(
    write: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1_500_000))
    refuses(
        r"not enough disk space for .*: it needs 33\.\d MB, 1\.5 MB are free",
        lambda: write(HFSource(HF), tmp_path / "new" / "target"),
    )
    assert os.listdir(tmp_path) == []


@WRITERS
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Error writing: [OS error 28: No space left on device]"),
    ],
    ids=["from the system", "from TensorStore"],
)
def test_disk_that_fills_up_leaves_nothing_behind(write: Callable, error: Exception, tmp_path: Path) -> None:
    def full(size: int) -> None:
        raise error

    refuses(
        "the disk is full; nothing was left behind", lambda: write(HFSource(HF), tmp_path / "a" / "b", progress=full)
    )
    assert os.listdir(tmp_path) == []


def test_disk_that_others_fill_is_noticed_before_orbax_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def others_write(size: int) -> None:
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10))

    monkeypatch.setattr(store.batches, "__defaults__", (1,))
    refuses("the disk is full", lambda: write_orbax(HFSource(HF), tmp_path / "target", progress=others_write))
    assert os.listdir(tmp_path) == [] and capfd.readouterr().err == ""


@WRITERS
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_nothing_behind_and_the_old_target_whole(
    write: Callable, error: type[BaseException], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    write(HFSource(GOLDEN / "qwen3_tied"), target)

    def stop(size: int) -> None:
        raise error

    with pytest.raises(error):
        write(HFSource(HF), target, overwrite=True, progress=stop)
    assert os.listdir(tmp_path) == ["target"]
    assert open_source(target).config.tie_word_embeddings


@WRITERS
def test_damaged_source_leaves_nothing_behind(write: Callable, tmp_path: Path) -> None:
    source = open_source(copy("qwen3_untied", tmp_path))
    truncate(source.path / "model.safetensors", 0.9)
    refuses("shorter than its header says", lambda: write(source, tmp_path / "target"))
    assert os.listdir(tmp_path) == ["qwen3_untied"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_directory_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refuses("cannot (write|create)", lambda: write_orbax(HFSource(HF), tmp_path / "target"))
    tmp_path.chmod(0o700)


# Mask tokens


def test_mask_token_must_be_one_token_of_the_vocabulary(tmp_path: Path) -> None:
    source = HFSource(write_checkpoint(tmp_path / "hf", TINY))
    assert find_mask_token(source, "23") == 23
    refuses(r"mask token id 24 is outside the vocabulary \(0 … 23\)", lambda: find_mask_token(source, "24"))
    refuses("outside the vocabulary", lambda: find_mask_token(source, "-1"))
    refuses("no tokenizer", lambda: find_mask_token(source, "<mask>"))


def test_mask_token_text_is_looked_up_in_the_tokenizer() -> None:
    source = open_source(GOLDEN / "gguf" / "llama_f32.gguf")
    text = source.tokenizer().convert_ids_to_tokens(1)
    assert find_mask_token(source, text) == 1
    refuses("tokens of this tokenizer; it must be exactly one", lambda: find_mask_token(source, "two words, or more"))


def test_broken_tokenizer_is_one_line(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "hf", TINY)
    (path / "tokenizer.json").write_text("{}")
    refuses("cannot load the tokenizer", lambda: open_source(path).tokenizer())


def test_safetensors_writer_refuses_a_tensor_that_was_not_announced(tmp_path: Path) -> None:
    from idlm_jax.checkpoint.safetensors import read_header, write_file

    layout = {"a": (np.dtype(np.float32), (2, 3))}
    with pytest.raises(ValueError, match="not what was announced"):
        list(write_file(tmp_path / "x.safetensors", layout, lambda name: np.zeros((3, 2), np.float32)))
    write_tensors(tmp_path / "empty.safetensors", {"none": np.zeros((0, 4), np.float32)})
    assert read_header(tmp_path / "empty.safetensors")["none"].read().shape == (0, 4)
