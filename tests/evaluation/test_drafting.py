"""Drafting in real decoding: sums over any batches, acceptance that fits together, texts compared with AR's."""

import json
from functools import cache

import numpy as np
import pytest

from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.generate import SamplingParams
from idlm_jax.errors import UserError
from idlm_jax.evaluation import drafting
from idlm_jax.evaluation.drafting import Drafting, markdown_table, measure_drafting
from idlm_jax.model import LanguageModel
from tests.cli.decoding_support import TOKENIZER
from tests.decoding.helpers import drafting_model

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
DECODES = [DecodeConfig(stride=3, layout="branch"), DecodeConfig(stride=3, layout="standard", coupling="ratio")]
TOKENS = 24


@cache
def model() -> LanguageModel:
    return LanguageModel(drafting_model(), TOKENIZER, has_adapter=False)


@cache
def measured(batch_size: int) -> list[Drafting]:
    return list(
        measure_drafting(model(), PROMPTS, DECODES, (0.0, 1.0), max_tokens=TOKENS, batch_size=batch_size, seed=3)
    )


def test_one_result_a_temperature_and_way_in_order() -> None:
    found = [(row.temperature, row.decode) for row in measured(4)]
    assert found == [(0.0, DECODES[0]), (0.0, DECODES[1]), (1.0, DECODES[0]), (1.0, DECODES[1])]
    assert all(row.prompts == 3 and row.tokens_per_second > 0 and row.ar_tokens_per_second > 0 for row in measured(4))


def test_counts_are_the_sums_over_the_prompts_answered_by_themselves() -> None:
    row = measured(4)[2]
    alone = [
        model().generate([prompt], SamplingParams(1.0, seed=3 + i, max_tokens=TOKENS), DECODES[0])[0].stats
        for i, prompt in enumerate(PROMPTS)
    ]
    assert row.stats.tokens == sum(stats.tokens for stats in alone)
    assert row.stats.forwards == sum(stats.forwards for stats in alone) < row.stats.tokens
    assert row.stats.accepted == tuple(np.sum([stats.accepted for stats in alone], axis=0))


def test_batches_do_not_change_what_gumbel_and_greedy_measure() -> None:
    for whole, cut in list(zip(measured(4), measured(1), strict=True))[:3]:
        assert whole.stats == cut.stats


def test_acceptance_by_depth_multiplies_to_that_of_the_first_k() -> None:
    for row in measured(4):
        assert 0 < row.by_depth[0] < 1
        np.testing.assert_allclose(np.cumprod(row.by_depth), row.stats.acceptance, rtol=1e-12)


def test_texts_that_must_be_ars_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row.same for row in measured(4)] == [3, 3, 3, None]
    monkeypatch.setattr(drafting, "first_difference", lambda ours, reference: 0)
    (row,) = measure_drafting(model(), PROMPTS, DECODES[:1], (0.0,), max_tokens=TOKENS, batch_size=4)
    assert row.same == 0


def test_progress_counts_to_its_end() -> None:
    said: list[str] = []
    list(measure_drafting(model(), PROMPTS, DECODES, (0.0, 1.0), max_tokens=TOKENS, batch_size=1, say=said.append))
    assert [line.split(":")[0] for line in said] == [f"{i} of 18" for i in range(1, 19)]
    assert said[0].endswith("temperature 0, prompts 1 to 1, AR") and "temperature 1, prompts 3 to 3, ISD" in said[-1]


def test_tables_and_json_hold_every_result() -> None:
    table = markdown_table(measured(4)).splitlines()
    assert len(table) == 2 + 4 and len({line.count("|") for line in table}) == 1
    assert (
        "| 3 | branch | gumbel | greedy |" in table[2] and table[2].endswith("| 3/3 |") and table[5].endswith("| - |")
    )
    values = json.loads(json.dumps(measured(4)[3].to_dict()))
    assert values["tokens_per_forward"] == values["tokens"] / values["forwards"] and values["same_as_ar"] is None


def test_a_request_that_cannot_run_is_one_line() -> None:
    with pytest.raises(UserError, match="exceeds the model's context"):
        next(measure_drafting(model(), PROMPTS, DECODES, (0.0,), max_tokens=10**6, batch_size=4))
