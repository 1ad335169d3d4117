"""``idlm chat``: turns, commands, interruption, and a context that is full."""

import io
from collections.abc import Callable

import pytest

from tests.cli.decoding_support import TINY, TOKENIZER, Script, refused, run

TEXT = "hello 12 and hello"
Talk = Callable[..., tuple[str, str]]


@pytest.fixture
def talk(script: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Type lines into a chat; returns what it printed."""
    script.text = "12"

    def type_in(*lines: str, flags: tuple[object, ...] = ()) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        model = ("chat", TINY, "--dtype", "float32", "--mask-token", 0, "--max-tokens", 20)
        code, out, err = run(capsys, *model, *flags)
        assert code == 0
        return out, err

    return type_in


def turns(prompt: str) -> list[str]:
    """The messages of a rendered prompt, the default system message and the open answer left out."""
    return [part.removesuffix("<|im_end|>\n") for part in prompt.split("<|im_start|>")[2:-1]]


def test_later_turns_see_earlier_ones_until_reset(talk: Talk, script: Script) -> None:
    out, _ = talk("a", "", "b", "/reset", "c")
    assert [turns(prompt) for prompt in script.prompts] == [
        ["user\na"],
        ["user\na", "assistant\n12", "user\nb"],
        ["user\nc"],
    ]
    assert out == "12\n12\na new conversation\n12\n"


def test_the_system_message_survives_a_reset(talk: Talk, script: Script) -> None:
    talk("a", "/reset", "b", flags=("--system", "brief"))
    assert all(prompt.startswith("<|im_start|>system\nbrief<|im_end|>") for prompt in script.prompts)


def test_commands_are_no_messages(talk: Talk, script: Script) -> None:
    out, _ = talk("/help", "/rest", "/exit", "a")
    assert script.prompts == []
    assert out.count("/reset") == 3 and "unknown command '/rest'; did you mean '/reset'?" in out


def test_interrupting_an_answer_keeps_the_session_and_what_was_said(talk: Talk, script: Script) -> None:
    script.text, script.interrupt = TEXT, KeyboardInterrupt
    out, _ = talk("a", "b", flags=("--max-tokens", 10))
    said = turns(script.prompts[1])[1].removeprefix("assistant\n")
    assert said and TEXT.startswith(said) and said != TEXT
    assert turns(script.prompts[1]) == ["user\na", f"assistant\n{said}", "user\nb"]
    assert out.startswith(f"{said}\nstopped; the conversation goes on\n")


def test_show_drafts_adds_a_line_of_statistics_after_every_answer(talk: Talk) -> None:
    assert talk("a", "b")[0].count("forwards") == 0
    assert talk("a", "b", flags=("--show-drafts",))[0].count("forwards") == 2


def test_drafts_have_a_colour_of_their_own_on_a_terminal(
    talk: Talk, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    script.text = "abcd"
    monkeypatch.setattr(
        "idlm_jax.cli.chat.make_console", lambda: Console(force_terminal=True, color_system="standard", highlight=False)
    )
    # One cold round, then rounds of two drafts and a token of the model's own.
    assert talk("a", flags=("--show-drafts",))[0].startswith("a\x1b[32mbc\x1b[0md")
    assert talk("a")[0].startswith("abcd")


def test_an_answer_that_is_cut_says_so(talk: Talk, script: Script) -> None:
    script.text = TEXT
    assert "cut at 3 tokens (--max-tokens)" in talk("a", flags=("--max-tokens", 3))[0]


def test_a_full_context_drops_nothing_and_suggests_reset(talk: Talk, script: Script) -> None:
    room = 128 - len(TOKENIZER(f"<|im_start|>system\n{'You are a helpful assistant'}<|im_end|>\n").input_ids)
    out, _ = talk("x" * room, "a", "/reset", "b")
    assert "would fill the model's context of 128 tokens; type /reset" in out
    assert [turns(prompt) for prompt in script.prompts] == [["user\na"], ["user\nb"]]


def test_a_nearly_full_context_shortens_the_answer_and_says_so(talk: Talk, script: Script) -> None:
    out, _ = talk("a", flags=("--max-tokens", 100))
    (sampling,) = script.sampling
    assert sampling.max_tokens == 128 - len(TOKENIZER(script.prompts[0]).input_ids) < 100
    assert f"the context has room for {sampling.max_tokens} more tokens" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--mask-token"),
        (("--mask-token", 0, "--ungated"), "--ungated says where an adapter acts"),
        (("--mask-token", 0, "--top-p", 2), "top_p must be in"),
    ],
)
def test_bad_flags_are_one_line(flags: tuple[object, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, "chat", TINY, *flags)
