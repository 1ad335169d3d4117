"""`idlm eval acceptance`: what it prints, and one line for what the user can mend."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from idlm_jax.cli import main as cli
from idlm_jax.data.tokens import TokenStoreWriter, tokenizer_hash
from tests.cli.decoding_support import TINY, TOKENIZER, refused, run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    target, rng = tmp_path / "store", np.random.default_rng(0)
    with TokenStoreWriter(target, vocab_size=280, tokenizer_hash=tokenizer_hash(TOKENIZER), settings={}) as writer:
        for _ in range(4):
            writer.append(rng.integers(3, 270, 20), np.arange(20) >= 4)
        writer.finish({})
    return target


def arguments(store: Path) -> list[object]:
    return ["eval", "acceptance", TINY, store, "--mask-token", 270, "--length", 40, "--batch-size", 2]


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "acceptance", "--help"])
    assert "idlm eval acceptance " in capsys.readouterr().out


def test_the_table_has_a_line_a_temperature_and_json_the_same_numbers(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--temperature", 0.7, "--temperature", 1, "--base", TINY]
    code, out, _ = run(capsys, *arguments(store), *more)
    assert code == 0
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    table = {line[0]: line[1:] for line in lines if line[0] in ("0.7", "1", "greedy")}
    assert len(table) == 3 and "N = 2, 3, 4" in out

    code, out_json, _ = run(capsys, *arguments(store), *more, "--json")
    values = json.loads(out_json)
    assert code == 0 and values["perplexity"] == values["base_perplexity"] and values["tokens"] == 4 * 16
    assert f"{values['rows']} drafts, 64 learnt tokens; perplexity {values['perplexity']:.3f}, base model" in out
    for row in values["temperatures"]:
        cells = table["greedy" if row["temperature"] == 0 else f"{row['temperature']:g}"]
        tokens = row["tokens_per_forward"]
        wanted = [row["by_depth"], row["prefix"], tokens["standard"].values(), tokens["branch"].values()]
        assert cells == [" ".join(f"{value:.3f}" for value in numbers) for numbers in wanted]
        assert set(tokens["branch"]) == {"2", "3", "4"}


def test_block_size_sets_the_strides(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, *arguments(store), "--block-size", 1, "--json")
    (sampled, greedy) = json.loads(out)["temperatures"]
    assert (sampled["temperature"], greedy["temperature"]) == (1.0, 0.0)
    assert set(sampled["tokens_per_forward"]["standard"]) == {"2"} and len(sampled["prefix"]) == 1


def test_what_cannot_be_measured_is_one_line(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "names no mask token" in refused(capsys, "eval", "acceptance", TINY, store, "--length", 40)
    assert "no token store here" in refused(capsys, *arguments(store.parent))
    assert "temperature must be positive" in refused(capsys, *arguments(store), "--temperature", 0)
    assert "did you mean 'float32'?" in refused(capsys, *arguments(store), "--dtype", "flaot32")
    assert "unknown verb 'eval acceptence'; did you mean 'acceptance'?" in refused(capsys, "eval", "acceptence")
