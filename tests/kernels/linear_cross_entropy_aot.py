"""Compile training losses of Qwen3-8B's head for an H100 that need not be there; run by test_linear_cross_entropy.py.

``h100.txtpb`` describes the chip to XLA. Programs are compiled, not run.
"""

import os
import re
from pathlib import Path
from typing import Any

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.linear_cross_entropy import xla
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.linear_cross_entropy.reference import SOFT_LOSSES

ROWS, WIDTH, VOCAB = (4, 4096), 4096, 151_936
# Operations that read the float32 logits of a part: normaliser, loss, gradient; ``ce`` gathers its loss.
READS = {"ce": 3, "kl": 3, "tv": 3}


def compiled(loss: str, head_trained: bool) -> Any:
    """The program of value and gradient."""
    description = (Path(__file__).parents[2] / "idlm_jax/planning/h100.txtpb").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology="1x1x1")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    hidden, head = array(jnp.bfloat16, *ROWS, WIDTH), array(jnp.float32 if head_trained else jnp.bfloat16, VOCAB, WIDTH)
    targets, weights = array(jnp.int32, *ROWS), array(jnp.float32, 1, *ROWS)

    def value(hidden: jax.Array, head: jax.Array, *rest: Any) -> jax.Array:
        return linear_cross_entropy(loss, hidden, head, *rest)[0][0]

    run = jax.jit(jax.value_and_grad(value, (0, 1) if head_trained else 0))
    return run.lower(hidden, head, targets, weights, hidden if loss in SOFT_LOSSES else None).compile()


def main() -> None:
    """Check memory, and how often logits are read, of every loss."""
    for loss, reads in READS.items():
        for head_trained in (False, True):
            program = compiled(loss, head_trained)
            scratch = program.memory_analysis().temp_size_in_bytes
            if head_trained:
                scratch -= 2 * VOCAB * WIDTH  # the head in bfloat16, which the three products take
            assert scratch <= xla.SCRATCH_BYTES, (loss, head_trained, scratch)
            text = program.as_text()
            logits = re.search(rf"(%\S+) = f32\[512,{VOCAB}\]\S* fusion\(.*kind=kCustom", text)
            assert logits, (loss, "no product makes the logits")
            readers = [line for line in text.splitlines() if re.search(rf"fusion\(.*{re.escape(logits[1])}[,)]", line)]
            assert len(readers) == reads, (loss, readers)
            assert not re.search(rf"= f32\[\d+,{VOCAB}\]\S* fusion\(.*kind=kLoop", text), (loss, "logits are copied")
            print(f"{loss}, head {'trained' if head_trained else 'frozen'}: {scratch / 1e9:.3f} GB", flush=True)


if __name__ == "__main__":
    main()
