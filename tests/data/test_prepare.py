"""Preparing gives the documents of the sources in order, whatever works on them and however often it is interrupted."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idlm_jax.checkpoint.gguf import GGUFSource
from idlm_jax.data import prepare as prepare_module
from idlm_jax.data.chat import encode_chat, encode_text
from idlm_jax.data.prepare import prepare, read_sources
from idlm_jax.data.tokens import TokenStore, check_tokenizer
from idlm_jax.errors import UserError
from tests.support import GOLDEN

MODEL = GOLDEN / "gguf" / "qwen3_f32.gguf"
TOKENIZER = GGUFSource(MODEL).tokenizer()
ROOT = Path(__file__).parents[2]


def chats(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    rng = np.random.default_rng(seed)
    words = ["the", "hello", "12", "and\n", "grüße", "he", "?"]

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(1, 30)))

    return [
        [{"role": ("user", "assistant")[i % 2], "content": text()} for i in range(rng.integers(2, 6))]
        for _ in range(count)
    ]


def write_chats(path: Path, messages: list[list[dict[str, str]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in messages), encoding="utf-8")
    return path


def run(sources: Any, target: Path, max_length: int = 200, workers: int = 1, **options: Any) -> TokenStore:
    paths = sources if isinstance(sources, list) else [sources]
    return prepare(read_sources(paths), TOKENIZER, target, max_length=max_length, workers=workers, **options)


def documents(store: TokenStore) -> list[tuple[list[int], list[bool]]]:
    return [(store[i].tokens.tolist(), store[i].loss_mask.tolist()) for i in range(len(store))]


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_chats_come_in_order_cut_at_the_maximal_length(tmp_path: Path) -> None:
    messages = chats(40)
    encoded = [encode_chat(TOKENIZER, m) for m in messages]
    store = run(write_chats(tmp_path / "a.jsonl", messages), tmp_path / "store", max_length=120)
    # Some are cut before the assistant's first word.
    kept = [(d.tokens[:120].tolist(), d.loss_mask[:120].tolist()) for d in encoded]
    expected = [(tokens, mask) for tokens, mask in kept if any(mask[1:])]
    assert documents(store) == expected
    counts = store.metadata["counts"]
    assert 0 < counts["cut_documents"] == sum(len(d.tokens) > 120 and any(d.loss_mask[1:120]) for d in encoded)
    assert 0 < counts["dropped_documents"] == 40 - len(expected)
    check_tokenizer(store.metadata, TOKENIZER, "store")


def test_plain_text_is_split_into_pieces_that_are_all_target(tmp_path: Path) -> None:
    texts = ["hello the 12 " * n for n in (1, 20)]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    whole = tmp_path / "b.txt"
    whole.write_text(texts[1])
    store = run([lines, whole], tmp_path / "store", max_length=16)
    pieces = []
    for text in (*texts, texts[1]):
        tokens = encode_text(TOKENIZER, text).tolist()
        pieces += [tokens[i : i + 16] for i in range(0, len(tokens), 16)]
    assert [tokens for tokens, _ in documents(store)] == [piece for piece in pieces if len(piece) > 1]
    assert all(all(mask) for _, mask in documents(store))
    assert store.metadata["counts"]["cut_documents"] == 0


def test_a_long_text_read_in_parts_is_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_PART_BYTES", 100)
    text = "".join(f"grüße {i} the\n" for i in range(100))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    store = run(tmp_path / "a.txt", tmp_path / "store", max_length=30)
    found = [token for tokens, _ in documents(store) for token in tokens]
    assert TOKENIZER.decode(found) == text + "<|im_end|>"


def test_the_store_names_its_sources(tmp_path: Path) -> None:
    paths = [write_chats(tmp_path / name, chats(n)) for name, n in (("a.jsonl", 4), ("b.jsonl", 7))]
    metadata = run(paths, tmp_path / "store", max_length=1000).metadata
    assert metadata["sources"] == [
        {
            "name": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
            "documents": n,
        }
        for path, n in zip(paths, (4, 7), strict=True)
    ]
    assert str(tmp_path) not in json.dumps(metadata)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_PART_BYTES", 1000)
    monkeypatch.setattr(prepare_module, "CHUNK", 300)


@pytest.mark.usefixtures("small_parts")
def test_the_store_does_not_depend_on_workers_or_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_chats(tmp_path / "a.jsonl", chats(60))
    seen: list[int] = []
    run(source, tmp_path / "parallel", workers=2, progress=seen.append)
    assert sum(seen) == source.stat().st_size and len(seen) > 8
    run(source, tmp_path / "alone")
    monkeypatch.setattr(prepare_module, "_PART_BYTES", 2**20)
    run(source, tmp_path / "whole")
    assert files(tmp_path / "parallel") == files(tmp_path / "alone") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_run_goes_on_to_the_same_store(tmp_path: Path) -> None:
    paths = [write_chats(tmp_path / f"{seed}.jsonl", chats(25, seed)) for seed in range(3)]
    text = tmp_path / "long.txt"
    text.write_text("hello the 12\n" * 400)
    sources = [paths[0], text, *paths[1:]]
    run(sources, tmp_path / "unbroken")
    size = sum(path.stat().st_size for path in sources)
    runs, started = 0, []
    while not (tmp_path / "store").exists():
        calls: list[int] = []

        def interrupt(done: int, calls: list[int] = calls) -> None:
            calls.append(done)
            if len(calls) == 5:
                raise KeyboardInterrupt

        try:
            run(sources, tmp_path / "store", progress=interrupt)
            assert sum(calls) == size  # what earlier runs did is counted as done
        except KeyboardInterrupt:
            started.append(calls[0])
        runs += 1
    assert runs > 4 and started == sorted(started)
    assert files(tmp_path / "store") == files(tmp_path / "unbroken")


def test_a_killed_run_leaves_no_process_and_goes_on_to_the_same_store(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "a.jsonl", chats(120))
    script = (
        "import os, sys; from idlm_jax.checkpoint.gguf import GGUFSource; from idlm_jax.data import prepare as p\n"
        "if __name__ == '__main__':\n"
        "    p._PART_BYTES, p.CHUNK = 1000, 300; calls = []\n"
        "    def progress(size):\n"
        "        calls.append(size)\n"
        "        if len(calls) == 20:\n"
        "            import multiprocessing as m; print(*[c.pid for c in m.active_children()], flush=True)\n"
        "            os.kill(os.getpid(), 9)\n"
        "    p.prepare(p.read_sources(sys.argv[2:3]), GGUFSource(sys.argv[1]).tokenizer(), sys.argv[3],\n"
        "              max_length=200, workers=2, progress=progress)\n"
    )
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, tmp_path / "script.py", MODEL, source, tmp_path / "store"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # A worker that outlives its parent would hold the pipes open.
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    workers = [int(pid) for pid in killed.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)
    assert (tmp_path / "store.partial").is_dir() and not (tmp_path / "store").exists()
    run(source, tmp_path / "store")
    run(source, tmp_path / "unbroken")
    assert files(tmp_path / "store") == files(tmp_path / "unbroken")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_bad_line_is_named_and_skipped_only_on_request(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "a.jsonl", chats(5))
    lines = source.read_text().splitlines()
    lines[2:2] = ["", '{"messages": [{"role": "usr", "content": "x"}]}', "{"]
    source.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl:4: .*'usr'.*did you mean 'user'.*--skip-bad"):
        run(source, tmp_path / "store", max_length=1000)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl"]
    store = run(source, tmp_path / "store", max_length=1000, skip_bad=True)
    assert (len(store), store.metadata["counts"]["bad_lines"]) == (5, 2)


@pytest.mark.usefixtures("small_parts")
def test_a_bad_line_found_late_can_be_skipped_without_starting_again(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "a.jsonl", chats(30))
    with source.open("a") as file:
        file.write("{\n")
    for _ in range(2):  # from the start, and from where the first one stopped
        with pytest.raises(UserError, match=r"a\.jsonl:31: not valid JSON"):
            run(source, tmp_path / "store")
    done: list[int] = []
    store = run(source, tmp_path / "store", skip_bad=True, progress=done.append)
    assert done[0] > 0 and store.metadata["counts"]["bad_lines"] == 1
    expected = run(write_chats(tmp_path / "b.jsonl", chats(30)), tmp_path / "other")
    assert documents(store) == documents(expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "no document to train on"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "q"}]}', "no document to train on .1 without a target"),
        ("a.txt", b"hello\nthe \xff\n", r"a.txt:2: not UTF-8 text$"),
        ("a.csv", b"a,b", "unknown kind of file; chats and texts are read from .jsonl and .txt"),
    ],
)
def test_sources_without_documents_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path / name, tmp_path / "store", skip_bad=name == "a.txt")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name]


def test_arguments_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    source = write_chats(tmp_path / "a.jsonl", chats(1))
    with pytest.raises(UserError, match="at least 2"):
        run(source, tmp_path / "store", max_length=1)
    with pytest.raises(UserError, match="0 workers"):
        run(source, tmp_path / "store", workers=0)
    with pytest.raises(UserError, match="no source"):
        read_sources([])
    with pytest.raises(UserError, match=r"is a directory; name its files"):
        read_sources([tmp_path])
    with pytest.raises(UserError, match=r"cannot read .*nowhere"):
        read_sources([tmp_path / "nowhere.jsonl"])
