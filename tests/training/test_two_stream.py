"""The two-stream pass against the official dense ``[x_t | x_0]`` forward, computed by PyTorch (method.md 2, 11)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlm_jax.backbone.qwen3 import Qwen3, Remat, causal_logits
from idlm_jax.checkpoint.peft import load_adapter
from idlm_jax.decoding.cache import cached_attention, init_cache
from idlm_jax.decoding.step import prefill_chunk
from idlm_jax.decoding.window import LAYOUTS, build_window
from idlm_jax.training.groups import Batch, GroupPolicy, NoisyRows, draw_groups
from idlm_jax.training.objective import Objective, training_loss
from idlm_jax.training.params import Flat, ModelBuilder, flat_adapter
from idlm_jax.training.two_stream import clean_stream, noisy_stream
from tests.decoding.support import tiny_adapter, tiny_config, tiny_model
from tests.training.support import (
    KEY,
    TRAINING,
    batch_of,
    close,
    golden,
    golden_model,
    golden_scalars,
    hf_gradients,
    random_batch,
)

MODELS = ("qwen3_tied", "qwen3_untied")
BLOCKS = (1, 2, 3, 7)


def golden_batch(name: str) -> Batch:
    return batch_of(golden(name)["tokens"], golden(name)["labels"] >= 0)


def aligned(block_size: int, mode: str = "full", **changes: object) -> Objective:
    return Objective(mode, GroupPolicy(block_size, "aligned", density=2.0), by_document=True, **changes)  # type: ignore


def streams(
    builder: ModelBuilder, params: Flat, batch: Batch, rows: NoisyRows, block: int, gated: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Clean and noisy logits."""
    model = builder.build(params)
    has_adapter = builder.adapter is not None
    hidden, states = clean_stream(model, batch, 0 if has_adapter and not gated else None)
    noisy = noisy_stream(model, rows, states, block, 0 if has_adapter else None)
    return np.asarray(model.logits(hidden)), np.asarray(model.logits(noisy))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", MODELS)
def test_aligned_groups_give_the_logits_of_the_dense_official_forward(name, block):
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


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_dense_official_forward(name, block):
    config, params = golden_model(name)
    builder, batch = ModelBuilder(config, dtype="float32"), golden_batch(name)
    scalars = golden_scalars()[name][f"b{block}"]

    def losses(params: Flat, objective: Objective) -> tuple[jax.Array, jax.Array]:
        parts = training_loss(builder.build(params), batch, objective, KEY, builder.head(params))
        return parts.noisy, parts.clean

    def oracle_loss(params: Flat, kind: str) -> jax.Array:
        # The oracle's batch takes the mean of CE_noisy over documents and of CE_clean over all targets.
        noisy, _ = losses(params, aligned(block))
        _, clean = losses(params, Objective("full", GroupPolicy(block, "aligned", 2.0)))
        balance = jax.lax.stop_gradient(noisy / clean) if kind == "loss_auto" else 0.2
        return noisy if kind == "ce_noisy" else noisy + balance * clean

    for kind in ("ce_noisy", "loss_fixed", "loss_auto"):
        value, gradient = jax.jit(jax.value_and_grad(oracle_loss), static_argnums=1)(params, kind)
        assert value == pytest.approx(scalars[kind], rel=1e-5)
        ours = hf_gradients(gradient, config)
        wanted = {key: array for key, array in golden(name).items() if key.startswith(f"b{block}/grad_{kind}/")}
        assert len(wanted) >= 6
        for key, array in wanted.items():
            assert close(ours[key.split("/")[-1]], array, 2e-5), key


@pytest.mark.parametrize("weight", [0.2, None])
def test_a_single_document_has_the_official_loss(weight):
    """One sample a device is what the official code runs: then every kind of mean is the same."""
    config, params = golden_model("qwen3_tied")
    builder, batch = ModelBuilder(config, dtype="float32"), golden_batch("qwen3_tied")
    scalars = golden_scalars()["qwen3_tied"]["b3"]
    for i in range(2):
        sample = jax.tree.map(lambda array, i=i: array[i : i + 1], batch)
        parts = training_loss(builder.build(params), sample, aligned(3, clean_weight=weight), KEY)
        total = "loss_auto_per_sample" if weight is None else "loss_fixed_per_sample"
        assert parts.noisy == pytest.approx(scalars["ce_noisy_per_sample"][i], rel=1e-5)
        assert parts.clean == pytest.approx(scalars["ce_clean_per_sample"][i], rel=1e-5)
        assert parts.total == pytest.approx(scalars[total][i], rel=1e-5)


def test_packed_documents_have_the_logits_and_gradients_of_documents_alone():
    config, params = golden_model("qwen3_tied")
    builder, data = ModelBuilder(config, dtype="float32"), golden("packed")
    batch = batch_of(data["tokens"], data["labels"] >= 0, data["segments"] + 1)
    assert np.array_equal(batch.positions, data["positions"])
    rows = draw_groups(batch, GroupPolicy(3, "aligned", 2.0), config.mask_token_id, KEY)
    clean, noisy = streams(builder, params, batch, rows, 3)
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

    def loss(params: Flat) -> jax.Array:
        model, head = builder.build(params), builder.head(params)
        noisy = training_loss(model, batch, aligned(3), KEY, head).noisy
        return noisy + 0.2 * training_loss(model, batch, Objective("full", GroupPolicy(3, "aligned")), KEY, head).clean

    ours = hf_gradients(jax.jit(jax.grad(loss))(params), config)
    for key, array in data.items():
        if key.startswith("grad_loss_fixed/"):
            assert close(ours[key.split("/")[-1]], array, 2e-5), key


@pytest.mark.parametrize("case", ["gated", "ungated"])
def test_adapters_give_the_logits_losses_and_gradients_of_the_dense_forward(case):
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

    value, gradient = jax.jit(jax.value_and_grad(loss))(trained)
    assert value == pytest.approx(scalars["ce_noisy"], rel=1e-5)
    for key, array in data.items():
        if not key.startswith(f"{case}/grad_ce_noisy/"):
            continue
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


def test_clean_logits_are_those_of_a_plain_causal_forward():
    model = tiny_model()
    stacked = tiny_builder().build(tiny_params())
    batch = batch_of(np.array([[1, 3, 0, 2, 4, 1]]), np.ones((1, 6), bool))
    hidden, _ = clean_stream(stacked, batch, None)
    assert close(stacked.logits(hidden), causal_logits(model, batch.tokens), 1e-6)


def tiny_builder(adapter: bool = False, **changes: object) -> ModelBuilder:
    settings = tiny_adapter(tiny_config()).config if adapter else None
    return ModelBuilder(tiny_config(), settings, "float32", **changes)  # type: ignore


def tiny_params(adapter: bool = False) -> Flat:
    from idlm_jax.backbone.weights import init_params
    from idlm_jax.training.params import flat_base

    base = flat_base(init_params(tiny_config(), jax.random.key(0), jnp.dtype(jnp.float32)))
    return {**base, **flat_adapter(tiny_adapter(tiny_config()).params)} if adapter else base


@pytest.mark.parametrize("start", [1, 3, 6])
def test_noisy_rows_are_the_mask_rows_of_the_decoder_after_the_same_prefix(start):
    """Training and decoding agree: the group at ``start`` is the decoder's, with the token before it pending."""
    config, block = tiny_config(), 3
    tokens = np.array([[1, 3, 0, 2, 4, 1, 2, 0, 3, 3]])
    batch = batch_of(tokens, np.ones_like(tokens, bool))
    policy = GroupPolicy(block, "random", density=3.0)
    rows = draw_groups(batch, policy, config.mask_token_id, KEY)
    _, noisy = streams(tiny_builder(True), tiny_params(True), batch, rows, block)
    # Groups lie in the order of the text; find the one that starts here.
    group = int(np.flatnonzero(np.asarray(rows.key_end)[0, ::block] == start)[0])

    model: Qwen3 = tiny_model(adapter=True)
    length = jnp.array([start - 1])
    cache = init_cache(config, 1, 32, jnp.dtype(jnp.float32))
    if start > 1:
        cache = prefill_chunk(model, cache, jnp.asarray(tokens[:, : start - 1]), jnp.int32(0), None)
    window = build_window(
        LAYOUTS["branch"],
        block + 1,
        config.mask_token_id,
        length,
        jnp.asarray(tokens[:, start - 1]),
        jnp.zeros((1, block), jnp.int32),
        jnp.array([False]),
    )
    hidden, _ = model(window.tokens, window.positions, cached_attention(length, window.mask), cache, block + 1)
    decoder = np.asarray(model.logits(hidden))[0, block + 1 : 2 * block + 1]
    assert close(noisy[0, group * block : (group + 1) * block], decoder)


@pytest.mark.parametrize("remat", list(Remat))
def test_what_the_backward_pass_computes_again_changes_nothing(remat):
    batch = random_batch(2, 20, 5)
    objective = Objective("gated-lora", GroupPolicy(3), "tv", loss_chunk=7)

    def gradient(builder: ModelBuilder, objective: Objective) -> Flat:
        def loss(params: Flat) -> jax.Array:
            return training_loss(builder.build(params), batch, objective, KEY).total

        return jax.jit(jax.grad(loss))(tiny_params(True))

    reference = gradient(tiny_builder(True, remat=Remat.NONE), Objective("gated-lora", GroupPolicy(3), "tv"))
    ours = gradient(tiny_builder(True, remat=remat), objective)
    for name in reference:
        assert close(ours[name], reference[name], 1e-5), name
    assert any(np.asarray(reference[name]).any() for name in reference if name.startswith("adapter."))
