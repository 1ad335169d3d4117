"""The choice of kernels reaches every operation of a decode that has some, and does not change the text."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from idlm_jax.decoding import cache, step
from idlm_jax.decoding.generate import SamplingParams, generate_tokens
from tests.decoding.helpers import drafting_model, make_policy


@pytest.mark.parametrize("kernels", ["auto", "xla"])
def test_every_operation_is_asked_for_the_chosen_kernels(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recording(operation: Callable, name: str) -> Callable:
        def record(*arguments, implementation, **options):
            asked.append((name, implementation))
            return operation(*arguments, implementation=implementation, **options)

        return record

    for module, name in ((cache, "window_attention"), (step, "verify"), (step, "draft")):
        monkeypatch.setattr(module, name, recording(getattr(module, name), name))
    # Programs compiled before know nothing of the recorder: a shape of its own.
    sampling = [SamplingParams(max_tokens=3, temperature=1.0, seed=1)]
    policy = replace(make_policy(2), kernels=kernels)
    for _ in generate_tokens(drafting_model(), [[5, 6, 7]], sampling, policy):
        pass
    assert set(asked) == {(name, kernels) for name in ("window_attention", "verify", "draft")}
