"""`idlm data prepare` and `inspect`: what they print, and one line for what the user can mend."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from idlm_jax.cli import main as cli
from idlm_jax.data.tokens import TokenStore
from tests.cli.decoding_support import TINY, TOKENIZER, refused, run
from tests.support import GOLDEN

CHATS = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": f"the {'hello ' * n}12"}] for n in range(6)
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CHATS))
    return path


@pytest.fixture
def store(source: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    target = source.with_name("store")
    assert run(capsys, "data", "prepare", source, "--model", TINY, "--output", target)[0] == 0
    return target


def test_the_group_lists_its_verbs_and_each_has_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "data", "--help")
    assert code == 0 and all(f"  {verb} " in out for verb in cli.GROUPS["data"])
    code, out, err = run(capsys, "data")
    assert (code, out) == (2, "") and "usage: idlm data VERB" in err
    for verb in ("prepare", "inspect"):
        with pytest.raises(SystemExit):
            cli.main(["data", verb, "--help"])
        assert f"idlm data {verb} " in capsys.readouterr().out


def test_unknown_verbs_of_the_group_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown verb 'data prepar'; did you mean 'prepare'?" in refused(capsys, "data", "prepar")


def test_prepare_prints_counts_and_nothing_else(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = source.with_name("store")
    code = cli.main(["data", "prepare", str(source), "--model", str(TINY), "--output", str(target)])
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    counts = TokenStore.open(target).metadata["counts"]
    assert out.startswith(f"wrote {target}\n") and re.search(r"documents +6\n", out)
    assert re.search(rf"targets +{counts['target_tokens']}\n", out)


def test_prepare_prints_json_and_skips_bad_lines_on_request(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = source.with_name("store")
    with source.open("a") as file:
        file.write('{"txt": "x"}\n')
    arguments = ["data", "prepare", source, "--model", TINY, "--output", target, "--json", "--max-length", 80]
    assert "chats.jsonl:7: expected" in refused(capsys, *arguments)
    code, out, _ = run(capsys, *arguments, "--skip-bad")
    metadata = json.loads(out)
    assert code == 0 and metadata.pop("path") == str(target)
    assert metadata == TokenStore.open(target).metadata
    assert (metadata["counts"]["bad_lines"], metadata["settings"]["max_length"]) == (1, 80)


def test_inspect_shows_documents_with_their_targets(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "data", "inspect", store, "--model", TINY, "--rows", 2, "--length", 200, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 2
    for row in rows:
        assert row["groups"] > 0 and len(row["documents"]) > 1
        for document in row["documents"]:
            messages = CHATS[[d[1]["content"] for d in CHATS].index(_targets(document).removesuffix("<|im_end|>"))]
            text = "".join(span["text"] for span in document)
            assert text == TOKENIZER.apply_chat_template(messages, tokenize=False)


def _targets(document: list[dict[str, Any]]) -> str:
    return "".join(span["text"] for span in document if span["target"])


def test_aligned_groups_hide_the_learnt_text_in_blocks(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", TINY, "--starts", "aligned", "--block-size", 4, "--json"]
    _, out, _ = run(capsys, "data", "inspect", store, *arguments)
    (document,) = json.loads(out)["documents"][:1]
    position, groups = 0, []
    for span in document:
        stop = position + len(TOKENIZER(span["text"])["input_ids"])
        if span["group"] is not None:
            assert span["target"] and position // 4 == (stop - 1) // 4
            groups.append(span["group"])
        position = stop
    assert groups == sorted(set(groups)) and len(groups) > 1


def test_inspect_prints_prompts_dim_and_groups_in_colour(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    code, out, _ = run(capsys, "data", "inspect", store, "--model", TINY)
    assert code == 0 and "\x1b[2m<|im_start|>user" in out
    assert all(f"\x1b[1;{colour}m" in out for colour in (35, 36))
    monkeypatch.delenv("FORCE_COLOR")
    _, plain, _ = run(capsys, "data", "inspect", store, "--model", TINY)
    assert "\x1b" not in plain and "document 1, " in plain and "mask groups: " in plain


def test_inspect_says_when_there_are_fewer_rows(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "data", "inspect", store, "--model", TINY, "--rows", 9, "--length", 2000)
    assert code == 0 and "row 1:" in out and "row 2:" not in out
    assert "fills no more than 1 rows of 2000 tokens" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "STORE", "--model", GOLDEN / "gguf" / "llama_f32.gguf"], "made with the tokenizer of another"),
        (["inspect", "STORE", "--model", TINY, "--length", 20], "does not fit a row of 20"),
        (["inspect", "STORE", "--model", TINY, "--rows", 0], "must be at least 1"),
        (["inspect", "STORE", "--model", TINY, "--block-size", 0], "must be at least 1"),
        (["inspect", GOLDEN, "--model", TINY], "no token store here"),
        (["prepare", "SOURCE", "--model", TINY, "--output", "STORE"], "exists already"),
        (["prepare", "SOURCE", "--model", GOLDEN / "llama_tied", "--output", "NEW"], "no tokenizer"),
        (["prepare", "nowhere.jsonl", "--model", TINY, "--output", "NEW"], "cannot read nowhere.jsonl"),
        (["prepare", "--model", TINY, "--output", "NEW"], "no source"),
        (["prepare", "SOURCE", "--model", TINY, "--output", "NEW", "--max-length", 1], "at least 2"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[Any], message: str, source: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"STORE": store, "SOURCE": source, "NEW": store.with_name("new")}
    assert message in refused(capsys, "data", *(places.get(str(item), item) for item in arguments))
    assert not places["NEW"].exists() and not places["NEW"].with_name("new.partial").exists()
