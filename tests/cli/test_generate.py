"""``idlm generate``: prompts, flags over files, what goes to which stream, and one line for every mistake."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.decoding_support import TINY, Script, json_lines, refused, run, write

ROOT = Path(__file__).parents[2]
GENERATE = ("generate", TINY, "--dtype", "float32", "--mask-token", 0, "--max-tokens", 20)
RAW = (*GENERATE, "--raw", "--prompt", "12")
TEXT = "hello 12 and hello"


def test_text_alone_goes_to_stdout_and_statistics_to_stderr(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *RAW)
    assert (code, out) == (0, TEXT + "\n")
    assert "forwards" in err and "acceptance" in err and "tokens/s" in err and err.count("\n") == 1


def test_prompts_go_through_the_chat_template_unless_raw(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, *GENERATE, "--prompt", "12", "--system", "be brief")
    run(capsys, *RAW)
    assert script.prompts == [
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n12<|im_end|>\n<|im_start|>assistant\n",
        "12",
    ]


def test_several_prompts_are_one_batch(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *RAW, "--prompt", "hello")
    assert code == 0 and out == f"==> 1 <==\n{TEXT}\n==> 2 <==\n{TEXT}\n"
    assert script.prompts == ["12", "hello"] and len(script.policies) == 1


def test_messages_come_from_a_file_and_stdin_is_a_prompt(
    script: Script, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = write(tmp_path / "chat.json", json.dumps(chat))
    run(capsys, *GENERATE, "--messages", path, "--system", "s")
    assert [part.split("\n")[0] for part in script.prompts[0].split("<|im_start|>")[1:]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    run(capsys, *GENERATE, "--raw")
    assert script.prompts[1] == "from a pipe"


def test_flags_win_over_the_decode_file_and_the_file_over_defaults(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ROOT / "configs" / "decode" / "isd_n3.yaml"
    run(capsys, *RAW, "--decode", file)
    run(capsys, *RAW, "--decode", file, "--stride", 2, "--layout", "standard", "--coupling", "ratio", "--top-k", 0)
    run(capsys, *RAW, "--temperature", 0.5, "--top-p", 0.5, "--seed", 9, "--stop", "x", "--stop", "y z", "--ignore-eos")
    used = [(p.stride, p.layout.name, p.coupling.name) for p in script.policies]
    assert used == [(3, "branch", "gumbel"), (2, "standard", "ratio"), (4, "branch", "gumbel")]
    filters = [(s.temperature, s.top_k, s.top_p) for s in script.sampling]
    assert filters == [(1.0, 50, 0.95), (1.0, 0, 0.95), (0.5, 0, 0.5)]
    last = script.sampling[-1]
    assert (last.seed, last.stop, last.ignore_eos, last.max_tokens) == (9, ("x", "y z"), True, 20)


def test_json_is_one_object_a_prompt(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *RAW, "--prompt", "hello", "--json", "--temperature", 1)
    first, second = json_lines(out)
    assert code == 0 and first["text"] == second["text"] == TEXT
    assert first["finish_reason"] == "stop" and first["sampling"]["seed"] != second["sampling"]["seed"]
    assert (first["stride"], first["layout"], first["coupling"]) == (4, "branch", "gumbel")
    assert {"tokens", "forwards", "tokens_per_forward", "acceptance", "cold_share", "seconds"} <= set(first["stats"])


def test_a_stop_string_ends_the_text(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, *RAW, "--stop", "2 a")[1] == "hello 1\n"


def test_compare_shows_equal_texts_once_and_differing_ones_with_the_first_difference(
    script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, *RAW, "--compare")
    assert code == 0 and out.count(TEXT) == 1 and "identical" in out and "same tokens as AR" in out
    assert [policy.stride for policy in script.policies] == [1, 4]
    assert "decoding by AR" in err and "decoding by ISD, N = 4, branch" in err
    # An AR that says something else.
    call = Script.__call__
    texts = iter(["hello 13", TEXT])

    def differ(self: Script, *arguments: Any) -> Any:
        self.text = next(texts)
        return call(self, *arguments)

    monkeypatch.setattr(Script, "__call__", differ)
    code, out, _ = run(capsys, *RAW, "--compare")
    assert code == 0 and "AR: hello 13" in out and f"branch: {TEXT}" in out
    assert "first difference at token 3: '2' " in out and ", AR '3' " in out and "In float32" in out


def test_real_comparison_on_a_tiny_model_is_identical_and_stdout_is_pure_json() -> None:
    command = [sys.executable, "-m", "idlm_jax.cli.main", *map(str, RAW), "--compare", "--json", "--temperature", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    (data,) = json_lines(result.stdout)
    assert data["identical"] is True and data["first_difference"] is None
    assert data["ar"]["token_ids"] == data["isd"]["token_ids"] and data["ar"]["sampling"] == data["isd"]["sampling"]
    assert (data["ar"]["stride"], data["isd"]["stride"]) == (1, 4)
    assert data["isd"]["stats"]["forwards"] < data["ar"]["stats"]["forwards"] == data["ar"]["stats"]["tokens"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt", "a", "--messages", "chat.json"], "--prompt or --messages, not both"),
        (["--prompt", "a", "--raw", "--system", "b"], "--raw takes the prompt as it stands"),
        (["--prompt", "a", "--stride", 17], "stride must be in 1 … 16, not 17"),
        (["--prompt", "a", "--stride", 12], "needs a window of 144 rows"),
        (["--prompt", "a", "--layout", "brunch"], "did you mean 'branch'?"),
        (["--prompt", "a", "--coupling", "gumble"], "did you mean 'gumbel'?"),
        (["--prompt", "a", "--kernels", "xal"], "did you mean 'xla'?"),
        (["--prompt", "a", "--temperature", -1], "temperature must be finite and not negative"),
        (["--prompt", "a", "--temperature", "nan"], "temperature must be finite"),
        (["--prompt", "a", "--top-p", 0], "top_p must be in (0, 1]"),
        (["--prompt", "a", "--top-p", 1.01], "top_p must be in (0, 1]"),
        (["--prompt", "a", "--top-k", -2], "top_k must be positive"),
        (["--prompt", "a", "--seed", -1], "seed must be in"),
        (["--prompt", "a", "--max-tokens", 0], "max_tokens must be at least 1"),
        (["--prompt", "a", "--max-tokens", 100], "exceeds the model's context of 128"),
        (["--prompt", "a" * 200], "exceeds the model's context of 128"),
        (["--prompt", "a", "--stop", ""], "stop strings must not be empty"),
        (["--prompt", "a", "--ungated"], "--ungated says where an adapter acts"),
        (["--prompt", "a", "--adapter", "nowhere"], "nowhere: no such"),
        (["--prompt", "a", "--decode", "nowhere.yaml"], "cannot read nowhere.yaml"),
        (["--prompt", "a", "--dtype", "float23"], "did you mean 'float32'?"),
        (["--prompt", "a", "--mask-token", "no such token"], "it must be exactly one"),
        (["--prompt", "a", "--compare", "--stride", 1], "give a larger stride"),
        (["--messages", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags: list[object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *GENERATE, *flags)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("{}", "expected a list of"),
        ("[]", "expected a list of"),
        ('["hello"]', "message 1 is not a"),
        ('[{"role": "user"}]', "message 1 is not a"),
        ('[{"role": "user", "content": 3}]', "message 1 is not a"),
        ('[{"role": "user", "content": "a"}, {"role": "usr", "content": "a"}]', "message 2 has the unknown role 'usr'"),
        ('[{"role": "usr", "content": "a"}]', "did you mean 'user'?"),
    ],
)
def test_bad_messages_files_are_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *GENERATE, "--messages", write(tmp_path / "chat.json", text))


def test_a_second_system_message_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "chat.json", '[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]')
    assert "has a system message already" in refused(capsys, *GENERATE, "--messages", path, "--system", "c")


def test_no_prompt_on_a_terminal_and_bytes_that_are_no_text_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert "no prompt: give --prompt" in refused(capsys, *GENERATE)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert "not UTF-8" in refused(capsys, *GENERATE)


def test_a_model_without_mask_token_names_the_flags_that_help(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    advice = refused(capsys, "generate", TINY, "--prompt", "a")
    assert "--mask-token" in advice and "--stride 1" in advice
    # A file that carries the name of the demo's model is told which token it is.
    copy = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    os.symlink(TINY, copy)
    assert "--mask-token 16" in refused(capsys, "generate", copy, "--prompt", "a")


def test_control_characters_reach_a_file_but_not_a_terminal(
    script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from idlm_jax.cli.render import printable

    assert printable("a\x1b[2J") == "a\x1b[2J"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert printable("a\x1b[2J\n\tö") == "a�[2J\n\tö"
