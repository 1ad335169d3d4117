"""The two-stream pass against the official dense ``[x_t | x_0]`` forward, computed by PyTorch (method.md 2, 11)."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.backbone.qwen3 import Qwen3, Remat, causal_logits
from idlm_jax.checkpoint.peft import load_adapter
from idlm_jax.decoding.cache import cached_attention, init_cache
from idlm_jax.decoding.step import prefill_chunk
from idlm_jax.decoding.window import LAYOUTS, build_window
from idlm_jax.training.groups import Batch, GroupPolicy, draw_groups
from idlm_jax.training.objective import Objective, training_loss
from idlm_jax.training.params import Flat, ModelBuilder, flat_adapter
from tests.decoding.support import tiny_config, tiny_model
from tests.training.support import (
    KEY,
    TRAINING,
    batch_of,
    close,
    compiled,
    golden,
    golden_model,
    golden_scalars,
    hf_gradients,
    random_batch,
    streams,
    tiny_builder,
    tiny_params,
)

# Every block size of one model, and one of the other, which has a head of its own.
CASES = [("qwen3_tied", 1), ("qwen3_tied", 2), ("qwen3_tied", 3), ("qwen3_tied", 7), ("qwen3_untied", 2)]


def golden_batch(name: str) -> Batch:
    return batch_of(golden(name)["tokens"], golden(name)["labels"] >= 0)


def aligned(block_size: int, mode: str = "full", **changes: object) -> Objective:
    return Objective(mode, GroupPolicy(block_size, "aligned", density=2.0), by_document=True, **changes)  # type: ignore


@partial(compiled, static_argnums=(0, 2))
def oracle_losses(
    builder: ModelBuilder, params: Flat, block: int, batch: Batch
) -> tuple[tuple[jax.Array, jax.Array], tuple[Flat, Flat]]:
    """CE_noisy as the oracle's batch has it, the mean over documents, CE_clean, the mean over rows; their gradients."""

    def losses(params: Flat) -> tuple[jax.Array, jax.Array]:
        model, head = builder.build(params), builder.head(params)
        noisy = training_loss(model, batch, aligned(block), KEY, head).noisy
        return noisy, training_loss(model, batch, Objective("ar", GroupPolicy(block)), KEY, head).clean

    values, pull_back = jax.vjp(losses, params)
    one, zero = jnp.float32(1), jnp.float32(0)
    return values, (pull_back((one, zero))[0], pull_back((zero, one))[0])


@pytest.mark.parametrize(("name", "block"), CASES)
def test_aligned_groups_give_the_logits_of_the_dense_official_forward(name: str, block: int) -> None:
    config, params = golden_model(name)
    batch = golden_batch(name)
    rows = draw_groups(batch, GroupPolicy(block, "aligned", density=2.0), config.mask_token_id, KEY)
    clean, noisy = streams(ModelBuilder(config, dtype="float32"), params, batch, rows, block)
    length = batch.tokens.shape[1]
    dense = golden(name)[f"b{block}/logits"]
    assert close(clean, dense[:, length:])
    is_target = np.asarray(rows.is_target)
    # Every masked row that has a target is there once, and only those.
    expected = np.asarray(batch.loss_mask & batch.clean_targets)
    assert [sorted(r[t]) for r, t in zip(np.asarray(rows.clean_row), is_target, strict=True)] == [
        list(np.flatnonzero(row)) for row in expected
    ]
    for i in range(len(dense)):
        assert close(noisy[i][is_target[i]], dense[i][np.asarray(rows.clean_row)[i][is_target[i]]])


@pytest.mark.parametrize(("name", "block"), CASES)
def test_losses_and_gradients_are_those_of_the_dense_official_forward(name: str, block: int) -> None:
    config, params = golden_model(name)
    scalars = golden_scalars()[name][f"b{block}"]
    (noisy, clean), gradients = oracle_losses(ModelBuilder(config, dtype="float32"), params, block, golden_batch(name))
    ours = [hf_gradients(gradient, config) for gradient in gradients]
    for kind, weight in (("ce_noisy", 0.0), ("loss_fixed", 0.2), ("loss_auto", float(noisy / clean))):
        assert float(noisy + weight * clean) == pytest.approx(scalars[kind], rel=1e-5)
        wanted = {key: array for key, array in golden(name).items() if key.startswith(f"b{block}/grad_{kind}/")}
        assert len(wanted) >= 6
        for key, array in wanted.items():
            parameter = key.split("/")[-1]
            assert close(ours[0][parameter] + weight * ours[1][parameter], array, 2e-5), key


@pytest.mark.parametrize("weight", [0.2, None])
def test_a_single_document_has_the_official_loss(weight: float | None) -> None:
    """One sample a device is what the official code runs: then every kind of mean is the same."""
    config, params = golden_model("qwen3_tied")
    builder, batch = ModelBuilder(config, dtype="float32"), golden_batch("qwen3_tied")
    scalars = golden_scalars()["qwen3_tied"]["b3"]
    loss = compiled(lambda sample: training_loss(builder.build(params), sample, aligned(3, clean_weight=weight), KEY))
    for i in range(2):
        parts = loss(jax.tree.map(lambda array, i=i: array[i : i + 1], batch))
        total = "loss_auto_per_sample" if weight is None else "loss_fixed_per_sample"
        assert parts.noisy == pytest.approx(scalars["ce_noisy_per_sample"][i], rel=1e-5)
        assert parts.clean == pytest.approx(scalars["ce_clean_per_sample"][i], rel=1e-5)
        assert parts.total == pytest.approx(scalars[total][i], rel=1e-5)


def test_packed_documents_have_the_logits_and_gradients_of_documents_alone() -> None:
    config, params = golden_model("qwen3_tied")
    builder, data = ModelBuilder(config, dtype="float32"), golden("packed")
    batch = batch_of(data["tokens"], data["labels"] >= 0, data["segments"] + 1)
    assert np.array_equal(batch.positions, data["positions"])
    rows = draw_groups(batch, GroupPolicy(3, "aligned", 2.0), config.mask_token_id, KEY)
    clean, noisy = (np.asarray(logits) for logits in streams(builder, params, batch, rows, 3))
    at = 0
    for document in range(2):
        dense = data[f"doc{document}/logits"]
        length = len(dense) // 2
        assert close(clean[0, at : at + length], dense[length:])
        where = np.asarray(rows.clean_row)[0]
        mine = np.asarray(rows.is_target)[0] & (where >= at) & (where < at + length)
        assert mine.any()
        assert close(noisy[0][mine], dense[where[mine] - at])
        at += length

    _, gradients = oracle_losses(builder, params, 3, batch)
    noisy_gradient, clean_gradient = (hf_gradients(gradient, config) for gradient in gradients)
    wanted = {key: array for key, array in data.items() if key.startswith("grad_loss_fixed/")}
    assert wanted
    for key, array in wanted.items():
        parameter = key.split("/")[-1]
        assert close(noisy_gradient[parameter] + 0.2 * clean_gradient[parameter], array, 2e-5), key


@pytest.mark.parametrize("case", ["gated", "ungated"])
def test_adapters_give_the_logits_losses_and_gradients_of_the_dense_forward(case: str) -> None:
    config, base = golden_model("qwen3_tied")
    adapter = load_adapter(TRAINING / "adapter", config)
    builder = ModelBuilder(config, adapter.config, "float32")
    data, scalars = golden("lora"), golden_scalars()["lora"][case]
    batch = golden_batch("qwen3_tied")
    trained = flat_adapter(adapter.params)
    objective = aligned(3, "gated-lora" if case == "gated" else "lora")

    def loss(trained: Flat) -> jax.Array:
        params = {**base, **trained}
        return training_loss(builder.build(params), batch, objective, KEY, builder.head(params)).noisy

    value, gradient = compiled(jax.value_and_grad(loss))(trained)
    assert value == pytest.approx(scalars["ce_noisy"], rel=1e-5)
    wanted = {key: array for key, array in data.items() if key.startswith(f"{case}/grad_ce_noisy/")}
    assert len(wanted) == 1 + 2 * len(adapter.config.target_modules)
    for key, array in wanted.items():
        name = key.split("/")[-1]
        if name == "mask_embedding":
            ours = np.asarray(gradient["adapter.mask_embedding"])
        else:
            _, _, module, projection, side = name.split(".")
            ours = np.asarray(gradient[f"adapter.layers.{module}.{projection}.{side[-1].lower()}"][0]).T
        assert close(ours, array, 2e-5), key

    rows = draw_groups(batch, objective.groups, config.mask_token_id, KEY)
    clean, noisy = streams(builder, {**base, **trained}, batch, rows, 3, gated=case == "gated")
    dense, length = data[f"{case}/logits"], batch.tokens.shape[1]
    assert close(clean, dense[:, length:])
    for i in range(len(dense)):
        target = np.asarray(rows.is_target)[i]
        assert close(noisy[i][target], dense[i][np.asarray(rows.clean_row)[i][target]])


TOKENS = np.array([[1, 3, 0, 2, 4, 1, 2, 0, 3, 3]])
GROUPS = GroupPolicy(3, "random", density=3.0)


@cache
def adapted_streams() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clean logits of TOKENS, noisy ones of all groups that can be drawn, and where those begin."""
    batch = batch_of(TOKENS, np.ones_like(TOKENS, bool))
    rows = draw_groups(batch, GROUPS, tiny_config().mask_token_id, KEY)  # type: ignore
    clean, noisy = streams(tiny_builder(True), tiny_params(True), batch, rows, GROUPS.block_size)
    return np.asarray(clean), np.asarray(noisy), np.asarray(rows.key_end)[0, :: GROUPS.block_size]


def test_clean_logits_are_those_of_a_plain_causal_forward() -> None:
    clean, _, _ = adapted_streams()
    assert close(clean, compiled(causal_logits)(tiny_model(), jnp.asarray(TOKENS)), 1e-6)


def test_noisy_rows_are_the_mask_rows_of_the_decoder_after_the_same_prefix() -> None:
    """Training and decoding agree: the group at s is the decoder's with the token at s - 1 pending."""
    config, block = tiny_config(), GROUPS.block_size
    model = tiny_model(adapter=True)
    _, noisy, starts = adapted_streams()

    @compiled
    def decoder(model: Qwen3, length: jax.Array, pending: jax.Array) -> jax.Array:
        """Logits of the masks after the pending token of one cold window."""
        cache = init_cache(config, 1, 32, jnp.dtype(jnp.float32))
        # What lies in the cache behind ``length`` is not seen.
        cache = prefill_chunk(model, cache, jnp.asarray(TOKENS), jnp.int32(0), None)
        drafts, cold = jnp.zeros((1, block), jnp.int32), jnp.array([False])
        window = build_window(LAYOUTS["branch"], block + 1, config.mask_token_id, length, pending, drafts, cold)
        hidden, _ = model(window.tokens, window.positions, cached_attention(length, window.mask), cache, block + 1)
        return model.logits(hidden)[0, block + 1 : 2 * block + 1]

    assert list(starts[:8]) == list(range(1, 9))
    for group, start in enumerate(starts[:8]):
        wanted = decoder(model, jnp.array([start - 1]), jnp.asarray(TOKENS[:, start - 1]))
        assert close(noisy[0, group * block : (group + 1) * block], wanted), start


@cache
def gradient_with(remat: Remat) -> Flat:
    """Of a gated adapter's loss."""
    batch = random_batch(2, 20, 5)
    objective = Objective("gated-lora", GroupPolicy(3), "tv")
    builder = tiny_builder(True, remat=remat)

    def loss(params: Flat) -> jax.Array:
        return training_loss(builder.build(params), batch, objective, KEY).total

    return compiled(jax.grad(loss))(tiny_params(True))


@pytest.mark.parametrize("remat", [Remat.DOTS, Remat.ATTENTION, Remat.BLOCK])
def test_what_the_backward_pass_computes_again_changes_nothing(remat: Remat) -> None:
    ours, reference = gradient_with(remat), gradient_with(Remat.NONE)
    for name in reference:
        assert close(ours[name], reference[name], 1e-5), name
    assert any(np.asarray(reference[name]).any() for name in reference if name.startswith("adapter."))
