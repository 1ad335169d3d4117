"""lm-evaluation-harness: log-likelihoods are PyTorch's and a plain pass's, texts those of ``generate``; a real run."""

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import idlm_jax
from idlm_jax.backbone.qwen3 import Qwen3
from idlm_jax.backbone.weights import fuse_projections
from idlm_jax.checkpoint.open import load_params, open_source
from idlm_jax.errors import UserError
from idlm_jax.evaluation.harness import IdlmModel
from idlm_jax.evaluation.lm_eval import main
from idlm_jax.model import LanguageModel
from tests.cli.decoding_support import TINY, TOKENIZER
from tests.decoding.helpers import drafting_adapter, drafting_model, full_forward
from tests.support import GOLDEN

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests" / "evaluation" / "local_tasks"
QUESTIONS = [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()]


@cache
def tiny() -> LanguageModel:
    return idlm_jax.load(TINY, mask_token=270)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # pyrefly: ignore[bad-argument-type]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def plain_scores(logits: np.ndarray, tokens: list[int], context: int) -> tuple[float, bool]:
    """Of the tokens after the first ``context``, from the logits of one text."""
    rows, targets = log_softmax(logits[context - 1 : len(tokens) - 1]), tokens[context:]
    value = sum(row[target] for row, target in zip(rows, targets, strict=True))
    return value, [int(row.argmax()) for row in rows] == targets


def logits_of(model: Qwen3, tokens: list[int], adapter_from: int | None = None) -> np.ndarray:
    """By one plain pass over one text; what is added behind it, so that one program does for all, it cannot see."""
    padded = jnp.asarray([tokens + [0] * (48 - len(tokens))])
    return np.asarray(full_forward(model, padded, adapter_from)[0])


def test_it_is_registered_by_name() -> None:
    assert get_model("idlm") is IdlmModel


@pytest.mark.parametrize("case", ["qwen3_tied", "llama_untied_bias"])
def test_log_likelihoods_equal_those_of_pytorch(case: str) -> None:
    source, golden = open_source(GOLDEN / case), load_file(GOLDEN / case / "golden.safetensors")
    params = fuse_projections(load_params(source, jnp.float32))
    ours = IdlmModel(LanguageModel(Qwen3(source.config, params), TOKENIZER, False), batch_size=4)
    requests, wanted = [], []
    for tokens, logits in zip(golden["input_ids"].tolist(), golden["logits"], strict=True):
        best = logits.argmax(axis=-1).tolist()
        for context, end in ((1, 3), (1, len(tokens)), (4, 9), (len(tokens) - 1, len(tokens))):
            requests.append((None, tokens[:context], tokens[context:end]))
            wanted.append(plain_scores(logits, tokens[:end], context))
        # One token that greedy decoding writes.
        requests.append((None, tokens[:5], [best[4]]))
        wanted.append((log_softmax(logits[4])[best[4]], True))
    found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], rtol=1e-4, atol=1e-4)


def test_a_gated_adapter_changes_no_likelihood_and_an_ungated_one_does() -> None:
    adapter, tokens = drafting_adapter(0.3), [5, 6, 7, 8, 9, 10]
    model = drafting_model(adapter)
    owner = LanguageModel(model, TOKENIZER, has_adapter=True)
    requests = [(None, tokens[:2], tokens[2:])]
    (gated,) = IdlmModel(owner)._loglikelihood_tokens(requests, disable_tqdm=True)
    (ungated,) = IdlmModel(owner, gated=False)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert gated[0] == pytest.approx(plain_scores(logits_of(drafting_model(), tokens), tokens, 2)[0], rel=1e-5)
    assert ungated[0] == pytest.approx(plain_scores(logits_of(model, tokens, 0), tokens, 2)[0], rel=1e-5)
    assert abs(gated[0] - ungated[0]) > 1e-3


def test_texts_longer_than_the_context_are_scored_once_a_token() -> None:
    """Every token with the most context that its window has: the whole window before the first is behind the prefix."""
    length, text = 8, "the quick brown fox"
    ours = IdlmModel(tiny(), max_length=length)
    tokens = TOKENIZER(text, add_special_tokens=False).input_ids
    assert length < len(tokens) < 4 * length and len(tokens) % length
    wanted = 0.0
    for first in range(0, len(tokens), length):
        last = min(first + length, len(tokens))
        # The last window is filled up from the left.
        window = tokens[max(0, last - length - 1) : last] if first else [ours.prefix_token_id, *tokens[:last]]
        wanted += plain_scores(logits_of(tiny().model, window), window, len(window) - (last - first))[0]
    (found,) = ours.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_context_that_is_too_long_loses_its_beginning() -> None:
    long, short = list(range(3, 40)), list(range(30, 40))
    ours = IdlmModel(tiny(), max_length=12)
    found = ours._loglikelihood_tokens([(None, long, [5, 6, 7]), (None, short, [5, 6, 7])], disable_tqdm=True)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    with pytest.raises(UserError, match="a continuation of 13 tokens is longer than the context of 12"):
        ours._loglikelihood_tokens([(None, [1], list(range(3, 16)))], disable_tqdm=True)


def test_texts_are_those_of_generate_in_the_order_of_the_requests() -> None:
    contexts = ["a", "the quick brown fox", "12", "hello there"]
    free = tiny().generate(contexts, idlm_jax.SamplingParams(max_tokens=10), stride=1)
    # A stop string that occurs, so that it matters.
    stop = free[0].text[2:4]
    settings = {"until": [stop], "max_gen_toks": 10, "do_sample": False, "temperature": 0.0}
    ours = IdlmModel(tiny(), stride=3, batch_size=2)
    found = ours.generate_until([request("generate_until", text, settings) for text in contexts], disable_tqdm=True)
    assert found == [answer.text.split(stop)[0] for answer in free] and found[0] != free[0].text


def test_sampling_follows_the_task_and_the_seed() -> None:
    settings = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    texts = {}
    for seed in (5, 6):
        requests = [request("generate_until", "hello", settings)] * 2
        texts[seed] = IdlmModel(tiny(), seed=seed, stride=3).generate_until(requests, disable_tqdm=True)
    assert texts[5][1] == texts[6][0] and len({*texts[5], *texts[6]}) == 3
    params = idlm_jax.SamplingParams(0.8, top_p=0.9, seed=5, max_tokens=10)
    assert texts[5][0] == tiny().generate("hello", params, stride=1)[0].text


def test_chats_go_through_the_models_template() -> None:
    ours = IdlmModel(tiny())
    chat = [{"role": "user", "content": "hello"}]
    rendered = ours.apply_chat_template(chat)
    assert ours.tok_encode(rendered) == tiny().encode(chat)
    assert rendered.startswith(ours.apply_chat_template(chat, add_generation_prompt=False)[:-2])
    assert ours.chat_template(True) == TOKENIZER.chat_template


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(UserError, match="batch_size must be a positive number, not auto"):
        IdlmModel(tiny(), batch_size="auto")
    with pytest.raises(UserError, match="did you mean 'branch'"):
        IdlmModel(tiny(), layout="brunch")
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        request_ = request("generate_until", "a", {"until": [], "max_gen_toks": 12})
        IdlmModel(tiny(), max_length=12).generate_until([request_], disable_tqdm=True)


def test_lm_eval_runs_local_tasks(tmp_path: Path) -> None:
    """The command line of lm_eval, without network: what it logs is what plain passes and ``generate`` give."""
    tasks = ("tiny_choice", "tiny_generate", "tiny_rolling")
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    model_args = f"pretrained={TINY},mask_token=270,stride=3"
    program = [sys.executable, "-m", "idlm_jax.evaluation.lm_eval", "--model", "idlm", "--model_args", model_args]
    more = ["--tasks", ",".join(tasks), "--include_path", str(TASKS), "--batch_size", "4"]
    output = ["--log_samples", "--output_path", str(tmp_path / "out")]
    environment = os.environ | offline | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*program, *more, *output], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    (folder,) = (tmp_path / "out").iterdir()
    samples = {
        task: [json.loads(line) for line in next(folder.glob(f"samples_{task}_*")).read_text().splitlines()]
        for task in tasks
    }
    values = json.loads(next(folder.glob("results_*")).read_text())["results"]
    model, right, log_p, size = tiny().model, 0, 0.0, 0
    sampling = idlm_jax.SamplingParams(max_tokens=12, stop=("\n\n",))
    answers = tiny().generate([question["question"] for question in QUESTIONS], sampling, stride=1)
    assert [line["resps"] for line in samples["tiny_generate"]] == [[[answer.text]] for answer in answers]
    for number, question in enumerate(QUESTIONS):
        text = question["question"]
        context = TOKENIZER(text).input_ids
        wholes = [TOKENIZER(f"{text} {choice}").input_ids for choice in question["choices"]]
        wanted = [plain_scores(logits_of(model, whole), whole, len(context))[0] for whole in wholes]
        found = [float(each[0][0]) for each in samples["tiny_choice"][number]["resps"]]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        right += int(np.argmax(wanted)) == question["answer"]
        whole = [IdlmModel(tiny()).prefix_token_id, *TOKENIZER(text, add_special_tokens=False).input_ids]
        log_p += plain_scores(logits_of(model, whole), whole, 1)[0]
        size += len(text.encode())
    assert values["tiny_choice"]["acc,none"] == right / len(QUESTIONS)
    assert values["tiny_rolling"]["byte_perplexity,none"] == pytest.approx(math.exp(-log_p / size), rel=1e-4)


def test_a_mistake_on_the_command_line_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("multiprocessing.set_start_method", lambda method: None)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: IdlmModel(tiny(), layout="brunch"))
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("idlm: error: unknown layout 'brunch'") and error.count("\n") == 1
