"""Who runs: the choice of an implementation by device, dtype and shape, and the kernels on a mesh."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.decode_attention import api as decode_api
from pallas_kernels.decode_attention import reference as decode_reference
from pallas_kernels.decode_attention.packing import Packing
from pallas_kernels.range_attention import api as range_api
from pallas_kernels.range_attention import cudnn
from pallas_kernels.range_attention import reference as range_reference

HOPPER = "gpu 9.0"
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def normal(seed, dtype, *sizes):
    return jax.random.normal(jax.random.key(seed), sizes, dtype)


def ranges(dtype=BF16, head_dim=64, group_size=2):
    """Arguments of range attention: 130 rows over 8 keys, in groups."""
    q, k, v = (normal(i, dtype, 2, 130, 2, head_dim)[:, : None if i == 0 else 8] for i in range(3))
    start = jnp.zeros((2, 130), jnp.int32)
    own = (normal(3, dtype, 2, 130, 2, head_dim), normal(4, dtype, 2, 130, 2, head_dim))
    return q, k, v, start, start + 5, own, group_size


def window(dtype=BF16, head_dim=64, rows=2, page=64):
    """Arguments of window attention."""
    q = normal(0, dtype, 2, rows, 2, head_dim)
    k, v = (normal(i, dtype, 2, 2, page, head_dim) for i in (1, 2))
    return q, k, v, jnp.array([page - rows, 0], jnp.int32), jnp.ones((2, rows, rows), bool)


def pages(**sizes):
    """Arguments of window attention over pages."""
    q, k, v, *rest = window(**sizes)
    return q, k, v, jnp.array([[1], [0]], jnp.int32), *rest


# Operation, its function's name, the API, the reference, and arguments.
OPERATIONS = {
    "range": ("range_attention", "range_attention", range_api, range_reference, ranges),
    "window": ("decode_attention", "window_attention", decode_api, decode_reference, window),
    "pages": ("decode_attention", "paged_window_attention", decode_api, decode_reference, pages),
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def on(monkeypatch, device, by_default=True):
    monkeypatch.setattr(dispatch, "device", lambda: device)
    monkeypatch.setattr(pallas_kernels, "BY_DEFAULT", by_default)
    dispatch._announce.cache_clear()


def chosen(monkeypatch, name, implementation, **sizes):
    """Which implementation ran: every one of them replaced by a function that says its name."""
    operation, function, api, reference, arguments = OPERATIONS[name]
    given = arguments(**sizes)
    monkeypatch.setattr(reference, function, lambda *_: "xla")
    monkeypatch.setattr(cudnn, "range_attention", lambda *_, **__: "cudnn")
    if dispatch.device() in dispatch._MODULES:
        monkeypatch.setattr(dispatch.kernels(operation), function, lambda *_, **__: "pallas")
    return getattr(api, function)(*given, implementation=implementation)


@pytest.mark.parametrize(
    ("device", "name", "sizes", "wanted", "why"),
    [
        (HOPPER, "range", {}, "pallas", ""),
        (HOPPER, "range", {"group_size": 18}, "cudnn", "groups of up to 17 rows, not 18"),
        (HOPPER, "range", {"head_dim": 96}, "cudnn", "head_dim 64 or 128, not 96"),
        (HOPPER, "range", {"dtype": F32}, "xla", "bfloat16 or float16, not float32"),
        ("gpu 8.0", "range", {}, "cudnn", "needs a Hopper GPU (compute capability 9.0) or a TPU, not gpu 8.0"),
        ("cpu", "range", {}, "xla", "needs a Hopper GPU (compute capability 9.0) or a TPU, not cpu"),
        ("tpu", "range", {}, "pallas", ""),
        ("tpu", "range", {"dtype": F32, "head_dim": 128}, "pallas", ""),
        ("tpu", "range", {"dtype": F16}, "xla", "bfloat16 or float32, not float16"),
        ("tpu", "range", {"head_dim": 96}, "xla", "head_dim 64 or 128, not 96"),
        ("tpu", "range", {"group_size": 130}, "xla", "groups of up to 128 rows, not 130"),
        (HOPPER, "window", {}, "pallas", ""),
        (HOPPER, "window", {"dtype": F32}, "xla", "queries float32 and cache float32: both must be bfloat16, or both "
         "float16"),
        (HOPPER, "window", {"rows": 65, "page": 128}, "xla", "65 window rows: at most 64"),
        (HOPPER, "pages", {"page": 64}, "pallas", ""),
        (HOPPER, "pages", {"page": 16}, "xla", "pages of 16 slots: must be a multiple of 64"),
        ("gpu 10.0", "window", {}, "xla", "needs a Hopper GPU (compute capability 9.0) or a TPU, not gpu 10.0"),
        ("cpu", "pages", {}, "xla", "needs a Hopper GPU (compute capability 9.0) or a TPU, not cpu"),
        ("tpu", "window", {}, "pallas", ""),
        ("tpu", "window", {"dtype": F32, "head_dim": 128}, "pallas", ""),
        ("tpu", "window", {"rows": 65, "page": 128}, "xla", "65 window rows: at most 64"),
        ("tpu", "pages", {"page": 16}, "pallas", ""),
        ("tpu", "pages", {"page": 8}, "xla", "pages of 8 slots: must be a multiple of 16"),
    ],
)  # fmt: skip
def test_auto_takes_pallas_where_it_can_and_says_its_choice_once(monkeypatch, caplog, device, name, sizes, wanted, why):
    on(monkeypatch, device)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            assert chosen(monkeypatch, name, "auto", **sizes) == wanted
    operation = OPERATIONS[name][0].replace("_", " ")
    assert [record.message for record in caplog.records] == [
        f"{operation}: {wanted} on {device}" + (f" (pallas: {why})" if why else "")
    ]
    if why:
        with pytest.raises(ValueError, match=re.escape(f"{operation}: 'pallas' does not run here: {why}")):
            chosen(monkeypatch, name, "pallas", **sizes)
    else:
        assert chosen(monkeypatch, name, "pallas", **sizes) == "pallas"
    assert chosen(monkeypatch, name, "xla", **sizes) == "xla"


@every_operation
@pytest.mark.parametrize("device", [HOPPER, "tpu"])
def test_one_switch_keeps_kernels_for_those_who_ask_by_name(monkeypatch, caplog, name, device):
    on(monkeypatch, device, by_default=False)
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        assert chosen(monkeypatch, name, "auto") == ("cudnn" if (name, device) == ("range", HOPPER) else "xla")
    assert caplog.records[0].message.endswith("(pallas: runs when asked for)")
    assert chosen(monkeypatch, name, "pallas") == "pallas"


@every_operation
def test_an_unknown_implementation_is_refused(monkeypatch, name):
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        chosen(monkeypatch, name, "fast")


def test_arrays_of_several_dtypes_are_not_for_the_kernels_of_range_attention(monkeypatch):
    on(monkeypatch, "tpu")
    q, k, v, *rest = ranges()
    with pytest.raises(ValueError, match="arrays of one dtype, not bfloat16, float32"):
        range_api.range_attention(q, k.astype(F32), v, *rest, implementation="pallas")


def test_on_a_cpu_auto_is_the_reference():
    arguments = window()
    np.testing.assert_array_equal(
        decode_api.window_attention(*arguments), decode_reference.window_attention(*arguments)
    )


@pytest.mark.parametrize(
    ("device", "implementation", "dtype", "packs"),
    [
        (HOPPER, "auto", BF16, True),
        (HOPPER, "xla", BF16, False),
        (HOPPER, "auto", F32, False),
        ("tpu", "auto", BF16, False),
    ],
)
def test_only_the_hopper_kernel_wants_queries_packed(monkeypatch, device, implementation, dtype, packs):
    on(monkeypatch, device)
    q, k, *_ = window(dtype)
    pack = decode_api.packing(implementation, jax.ShapeDtypeStruct(q.shape, q.dtype), k, paged=False)
    assert pack == (Packing(rows=2, heads=2, group=1) if packs else None)


@pytest.mark.parametrize("device", [HOPPER, "tpu"])
@every_operation
def test_on_a_mesh_each_device_has_its_own_batch_and_heads(monkeypatch, name, device):
    """The reference in the kernels' place, which would not find its way through sharded operands either."""
    operation, function, api, reference, arguments = OPERATIONS[name]
    on(monkeypatch, device)
    seen = []

    def local(*given, **options):
        seen.append(jax.typeof(given[0]).sharding.mesh)
        return getattr(reference, function)(*given, **options)

    monkeypatch.setattr(dispatch.kernels(operation), function, local)
    given = arguments()
    size = {"group_size": given[-1]} if name == "range" else {}
    arrays = given[: len(given) - len(size)]
    wanted = getattr(reference, function)(*arrays, **size)

    def spec(array):
        if array.ndim < 4:
            return P("data")
        heads = 1 if name != "range" and array is not given[0] else 2
        return P("data", *[None] * (heads - 1), "tp")

    mesh = jax.make_mesh((1, 1), ("data", "tp"), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda array: jax.device_put(array, NamedSharding(mesh, spec(array))), arrays)
        ours = jax.jit(lambda *arrays: getattr(api, function)(*arrays, **size))(*placed)
    assert ours.sharding.spec == P("data", None, "tp", None)
    assert all(kind == AxisType.Manual for kind in seen[0].axis_types)
    np.testing.assert_array_equal(ours, wanted)
