"""Losses and gradients on meshes of 8 simulated devices and on one; run by test_linear_cross_entropy.py."""

import jax

jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from idlm_jax.backbone.sharding import BATCH_AXES, MESH_AXES  # noqa: E402
from pallas_kernels.linear_cross_entropy import reference, xla  # noqa: E402
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy, map_rows  # noqa: E402
from tests.kernels.test_linear_cross_entropy import inputs, outcome  # noqa: E402
from tests.training.support import close, compiled  # noqa: E402

# Mesh (data, fsdp, tp), where the head lies, and the loss.
CASES = [
    ((2, 2, 2), P("tp", "fsdp"), "tv"),
    ((2, 2, 2), P("tp", "fsdp"), "ce"),
    ((1, 1, 8), P("tp", None), "kl"),
    ((8, 1, 1), P(None, None), "ce"),
    # A vocabulary split over devices that have different rows, and a width over devices that have the same.
    ((1, 4, 2), P("fsdp", "tp"), "kl"),
]


def main() -> None:
    """Compare every case with whole logits on one device."""
    xla.SCRATCH_BYTES = 3 * 2 * 4 * 40
    for shape, head_spec, loss in CASES:
        given = inputs(loss, batch=8, rows=5, vocab=40, sets=2)
        cotangent = jnp.asarray([0.5, -2.0])
        wanted = outcome(reference.linear_cross_entropy, loss, given, cotangent)
        mesh = jax.make_mesh(shape, MESH_AXES)
        with jax.set_mesh(mesh):
            specs = (P(BATCH_AXES), head_spec, P(BATCH_AXES), P(None, BATCH_AXES), P(BATCH_AXES))
            placed = [
                None if array is None else jax.device_put(array, NamedSharding(mesh, spec))
                for array, spec in zip(given, specs, strict=True)
            ]
            ours = outcome(linear_cross_entropy, loss, type(given)(*placed), cotangent)
            assert ours[2].sharding.spec[0] == BATCH_AXES and ours[3].sharding.spec == head_spec, shape
            for name, mine, other in zip(("sums", "losses", "d_hidden", "d_head"), ours, wanted, strict=True):
                assert close(mine, other, 5e-6), (shape, head_spec, loss, name)
            if head_spec[0] == "fsdp":
                continue  # no layout of the model's: an array cannot be split twice over one axis

            def mapped(hidden, head, targets, teacher, loss=loss):
                return map_rows(reference.ROW_LOSSES[loss], hidden, head, targets, teacher)

            assert close(compiled(mapped)(*placed[:3], placed[4]), wanted[1], 5e-6), (shape, head_spec, "map_rows")
            print(shape, head_spec, loss, "ok", flush=True)


if __name__ == "__main__":
    main()
