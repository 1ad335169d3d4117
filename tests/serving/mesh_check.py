"""The tests of the engine over two simulated devices, and a service that runs it in a thread; run by test_mesh.py."""

import jax

jax.config.update("jax_num_cpu_devices", 2)

import sys  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from idlm_jax import load  # noqa: E402
from idlm_jax.backbone.qwen3 import Qwen3  # noqa: E402
from idlm_jax.backbone.sharding import decoding_mesh  # noqa: E402
from idlm_jax.decoding.config import DecodeConfig  # noqa: E402
from idlm_jax.decoding.generate import SamplingParams  # noqa: E402
from idlm_jax.decoding.step import Policy  # noqa: E402
from idlm_jax.serving.engine import PagedEngine  # noqa: E402
from tests.decoding.helpers import AR, drafting_adapter, drafting_config, drafting_params  # noqa: E402
from tests.decoding.operations import by_operations  # noqa: E402
from tests.decoding.support import laid_out  # noqa: E402
from tests.serving import test_engine  # noqa: E402
from tests.serving.support import TINY, post, serving, tiny  # noqa: E402

# What a mesh could break: programs compiled twice, texts that are preempted, whole rows of the vocabulary, an adapter
# on every row, shared pages.
ENGINE = (
    "test_warming_up_leaves_nothing_to_compile",
    "test_log_probabilities_are_those_of_a_plain_forward_for_whoever_asks[True]",
    "test_log_probabilities_are_those_of_a_plain_forward_for_whoever_asks[False]",
    "test_a_shared_beginning_is_computed_once_and_changes_no_text",
)


def split_model() -> Qwen3:
    """The model of those tests, over both devices."""
    config = drafting_config()
    mesh = decoding_mesh(config, tp=2, data_parallel=1)
    assert mesh is not None
    return laid_out(config, drafting_params(), drafting_adapter(), mesh)


class OverTwoDevices:
    """Every engine; what it is compared with is still computed on one device."""

    @pytest.fixture(autouse=True)
    def over_two_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def engine_of(policies: Sequence[Policy], pages: int | None = None, **more: int) -> PagedEngine:
            return make(policies, pages, split_model(), **more)

        make = test_engine.engine_of
        monkeypatch.setattr(test_engine, "engine_of", engine_of)


class ByFewLaunches(OverTwoDevices):
    """The same with layers that run as the kernels would run them."""

    @pytest.fixture(autouse=True)
    def by_few_launches(self) -> Iterator[None]:
        with by_operations() as used:
            yield
        assert used


def check_layout() -> None:
    """Each device has half of the weights and of the key heads."""
    model = split_model()
    engine = PagedEngine(model, [AR], 2, 64)
    for array, axis in ((model.layers[0].mlp.down_proj.kernel[...], 0), (engine._state.cache[0][0], 1)):
        whole = np.array(array.shape)
        whole[axis] //= 2
        assert [part.data.shape for part in array.addressable_shards] == [tuple(whole)] * 2


def check_service() -> None:
    """A server's answer, from its thread, is what one device says."""
    policy = DecodeConfig(stride=3).policy()
    model = load(TINY, dtype="float32", mask_token=0, tp=2).model
    with serving(lambda: PagedEngine(model, [policy], 2, 64)) as (_, app):
        asked = {"prompt": "hello", "max_tokens": 12, "temperature": 0.8, "seed": 5}
        answer = post(app, "/v1/completions", {"model": "tiny", **asked}).json()
    sampling = SamplingParams(0.8, seed=5, max_tokens=12)
    assert answer["choices"][0]["text"] == tiny().generate("hello", sampling)[0].text


if __name__ == "__main__":
    check_layout()
    check_service()
    chosen = [f"{test_engine.__file__}::{name}" for name in ENGINE]
    failed = pytest.main([*chosen, "-q", "-x"], [OverTwoDevices()])
    jax.clear_caches()
    sys.exit(failed or pytest.main([chosen[-1], "-q"], [ByFewLaunches()]))
