"""The token store: what is written is read back, whatever interrupts the writer, and damage is noticed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from idlm_jax.checkpoint.gguf import GGUFSource
from idlm_jax.data import tokens as tokens_module
from idlm_jax.data.tokens import TokenStore, TokenStoreWriter, check_tokenizer, tokenizer_hash, vocabulary_size
from idlm_jax.errors import UserError
from tests.support import GOLDEN

Documents = list[tuple[np.ndarray, np.ndarray]]


def random_documents(count: int, seed: int = 0, vocab_size: int = 300, longest: int = 20) -> Documents:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    return [(rng.integers(0, vocab_size, n), rng.random(n) < 0.5) for n in lengths]


def writer(target: Path, vocab_size: int = 300, **options: Any) -> TokenStoreWriter:
    defaults: dict[str, Any] = {"tokenizer_hash": "hash", "settings": {"max_length": 20}}
    return TokenStoreWriter(target, vocab_size=vocab_size, **{**defaults, **options})


def write(target: Path, documents: Documents, **options: Any) -> TokenStore:
    with writer(target, **options) as out:
        for tokens, loss_mask in documents:
            out.append(tokens, loss_mask)
        out.finish({"note": "test"})
    return TokenStore.open(target)


def assert_holds(store: TokenStore, documents: Documents) -> None:
    assert len(store) == len(documents)
    assert store.lengths().tolist() == [len(tokens) for tokens, _ in documents]
    for i in reversed(range(len(store))):
        np.testing.assert_array_equal(store[i].tokens, documents[i][0])
        np.testing.assert_array_equal(store[i].loss_mask, documents[i][1])
        assert (store[i].tokens.dtype, store[i].loss_mask.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize("vocab_size", [2, 2**16, 2**16 + 1, 151936])
def test_documents_come_back_with_any_vocabulary(vocab_size: int, tmp_path: Path) -> None:
    documents = random_documents(30, vocab_size=vocab_size)
    documents.append((np.array([vocab_size - 1]), np.array([True])))
    assert_holds(write(tmp_path / "store", documents, vocab_size=vocab_size), documents)


def test_store_json_counts_what_is_there(tmp_path: Path) -> None:
    documents = random_documents(10)
    with writer(tmp_path / "store") as out:
        for document in documents:
            out.append(*document)
        out.finish({"counts": {"cut_documents": 3}, "sources": [{"name": "a.jsonl"}]})
    metadata = TokenStore.open(tmp_path / "store").metadata
    assert metadata["counts"] == {
        "documents": 10,
        "tokens": sum(len(tokens) for tokens, _ in documents),
        "target_tokens": sum(int(mask.sum()) for _, mask in documents),
        "cut_documents": 3,
    }
    assert metadata["sources"] == [{"name": "a.jsonl"}] and metadata["settings"] == {"max_length": 20}


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), chunk=st.sampled_from([1, 7, 64, 2**18]))
def test_an_interrupted_write_resumes_to_the_same_store(data: st.DataObject, chunk: int, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    documents = random_documents(data.draw(st.integers(1, 25)), seed=data.draw(st.integers(0, 99)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "CHUNK", chunk)
        write(tmp_path / "whole", documents)
        done = 0
        while done < len(documents):
            with writer(tmp_path / "store", resume=True) as out:
                # The state says what is safe; what was appended after the last flush is lost.
                assert out.state.get("next", 0) == out.documents <= done
                done = out.documents
                for document in documents[done : done + data.draw(st.integers(1, 5))]:
                    out.append(*document)
                    done += 1
                    if data.draw(st.booleans()):
                        out.flush({"next": done})
                if done == len(documents):
                    out.finish({"note": "test"})
                else:
                    done = max(done, out.documents)
        assert not (tmp_path / "store.partial").exists()
        assert_holds(TokenStore.open(tmp_path / "store"), documents)
    ours, whole = (
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("store", "whole")
    )
    assert ours == whole


def test_a_flush_that_was_killed_midway_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(12)
    with writer(tmp_path / "store") as out:
        for document in documents[:5]:
            out.append(*document)
        out.flush({"next": 5})
        for document in random_documents(9, seed=1):
            out.append(*document)

        def killed(*arguments: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(out, "_save_progress", killed)
        with pytest.raises(KeyboardInterrupt):
            out.flush({"next": 14})
    with writer(tmp_path / "store", resume=True) as out:
        assert (out.documents, out.state) == (5, {"next": 5})
        for document in documents[5:]:
            out.append(*document)
        out.finish({})
    assert_holds(TokenStore.open(tmp_path / "store"), documents)


def test_nothing_is_left_of_a_write_without_a_flush(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writer(tmp_path / "store") as out:
        out.append(*random_documents(1)[0])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_keeps_what_was_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(6)
    with writer(tmp_path / "store") as out:
        for document in documents[:3]:
            out.append(*document)
        out.flush({"next": 3})
        out.append(*documents[3])
        with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is full; the 3 documents in"):
            patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))  # pyrefly: ignore
            out.flush({"next": 4})
    with writer(tmp_path / "store", resume=True) as out:
        for document in documents[out.state["next"] :]:
            out.append(*document)
        out.finish({})
    assert_holds(TokenStore.open(tmp_path / "store"), documents)


def _interrupt(target: Path, **options: Any) -> None:
    with writer(target, **options) as out:
        out.append(*random_documents(1)[0])
        out.flush({})


def test_a_write_resumes_only_as_it_was_begun_and_only_when_asked(tmp_path: Path) -> None:
    _interrupt(tmp_path / "store")
    with pytest.raises(UserError, match="holds an interrupted write"):
        writer(tmp_path / "store")
    with pytest.raises(UserError, match=r"begun with another max_length \(20, now 21\)"):
        writer(tmp_path / "store", resume=True, settings={"max_length": 21})
    with pytest.raises(UserError, match="another tokenizer_hash"):
        writer(tmp_path / "store", resume=True, tokenizer_hash="other")
    (tmp_path / "store.partial" / "progress.json").write_text("{")
    with pytest.raises(UserError, match="damaged; delete"):
        writer(tmp_path / "store", resume=True)


def test_two_writers_of_one_store_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "store") as out:
        out.append(*random_documents(1)[0])
        out.flush({})
        with pytest.raises(UserError, match="being written by another process"):
            writer(tmp_path / "store", resume=True)


def test_targets_that_exist_and_stores_without_documents_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "store") as out, pytest.raises(UserError, match="not one document"):
        out.finish({})
    write(tmp_path / "store", random_documents(1))
    with pytest.raises(UserError, match="exists already"):
        writer(tmp_path / "store")


@pytest.mark.parametrize(
    ("tokens", "loss_mask"), [([], []), ([1, 2], [True]), ([300], [True]), ([-1], [True]), ([[1]], [[True]])]
)
def test_documents_that_are_none_are_refused(tokens: list, loss_mask: list, tmp_path: Path) -> None:
    with (
        writer(tmp_path / "store") as out,
        pytest.raises(ValueError, match=r"a document of shape|leave the vocabulary"),
    ):
        out.append(np.array(tokens), np.array(loss_mask, bool))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["tokens/c/1", "loss_mask/c/0", "offsets/c/0", "tokens/zarr.json", "store.json"])
@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
def test_damage_is_one_clear_line(name: str, damage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "CHUNK", 50)
    write(tmp_path / "store", random_documents(10))
    damage(tmp_path / "store" / name)
    with pytest.raises(UserError, match=r"damaged|no token store here|not valid JSON|no format_version") as caught:
        store = TokenStore.open(tmp_path / "store")
        for i in range(len(store)):
            store[i]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [_cut, Path.unlink])
def test_lost_data_is_noticed_when_the_store_is_opened(damage: Any, tmp_path: Path) -> None:
    write(tmp_path / "store", random_documents(10))
    damage(tmp_path / "store" / "tokens" / "c" / "0")
    with pytest.raises(UserError, match=r"damaged or incomplete \(tokens has \d+ bytes, not"):
        TokenStore.open(tmp_path / "store")


def test_data_lost_while_the_store_is_open_is_not_read_as_zeros(tmp_path: Path) -> None:
    store = write(tmp_path / "store", random_documents(10))
    (tmp_path / "store" / "tokens" / "c" / "0").unlink()
    with pytest.raises(UserError, match=r"damaged or incomplete \(.*missing"):
        store[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "newer than this idlm_jax reads"),
        ({"format_version": None}, "not a token store"),
        ({"counts": {"documents": 0, "tokens": 0, "target_tokens": 0}}, "is empty"),
        ({"counts": {"documents": 9, "tokens": 9}}, "lacks entries"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "store", random_documents(1))
    _edit(tmp_path / "store" / "store.json", **changes)
    with pytest.raises(UserError, match=message):
        TokenStore.open(tmp_path / "store")


def test_a_missing_store_is_refused_and_an_unfinished_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no token store here \(no store.json\)"):
        TokenStore.open(tmp_path / "store")
    _interrupt(tmp_path / "store")
    with pytest.raises(UserError, match=r"store\.partial is not finished"):
        TokenStore.open(tmp_path / "store")


def test_the_hash_tells_tokenizers_apart_and_forgets_how_they_were_called() -> None:
    first, other = (GGUFSource(GOLDEN / "gguf" / name).tokenizer() for name in ("llama_f32.gguf", "qwen3_f32.gguf"))
    before = tokenizer_hash(first)
    first(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(first) == before != tokenizer_hash(other)
    check_tokenizer({"tokenizer_hash": before}, first, "store")
    with pytest.raises(UserError, match="made with the tokenizer of another model"):
        check_tokenizer({"tokenizer_hash": before}, other, "store")
    assert vocabulary_size(first) == 280
