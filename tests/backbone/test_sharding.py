"""The weight table's axes lay weights out over a mesh (simulated devices, in a process of its own)."""

import os
import subprocess
import sys

from tests.support import GOLDEN

SCRIPT = """
import sys
import jax, jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from idlm_jax.backbone.adapter import AdapterConfig
from idlm_jax.backbone.sharding import ShardingRules, weight_sharding
from idlm_jax.backbone.weights import init_params, weight_table
from idlm_jax.checkpoint.open import load_params, open_source

source = open_source(sys.argv[1])
mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "tp"))
sharded, whole = load_params(source, sharding=weight_sharding(mesh)), load_params(source)
jax.tree.map(np.testing.assert_array_equal, sharded, whole)
layer = sharded["layers"][0]["self_attn"]
assert layer["q_proj"]["kernel"].sharding.spec == P("fsdp", "tp"), layer["q_proj"]["kernel"].sharding
assert layer["o_proj"]["kernel"].sharding.spec == P("tp", "fsdp")
assert layer["q_norm"]["scale"].sharding.spec == P(None)
assert sharded["embed_tokens"]["embedding"].sharding.spec == P("tp", "fsdp")
assert len({shard.device for shard in layer["q_proj"]["kernel"].addressable_shards}) == 4

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: name.endswith("backend_compile_duration") and compiled.append(name)
)
made = init_params(source.config, jax.random.key(0), jnp.float32, weight_sharding(mesh))
assert 0 < len(compiled) < len(jax.tree.leaves(made)), len(compiled)  # weights that are alike share a program
alone = init_params(source.config, jax.random.key(0), jnp.float32)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), made, alone)
assert made["layers"][0]["self_attn"]["q_proj"]["kernel"].sharding.spec == P("fsdp", "tp")

adapter = ShardingRules().adapter_specs(source.config, AdapterConfig(3, 8), mesh)
assert adapter["self_attn"]["q_proj"] == {"a": P(None, "fsdp", None), "b": P(None, None, ("tp", "fsdp"))}, adapter
assert adapter["mlp"]["down_proj"] == {"a": P(None, ("tp", "fsdp"), None), "b": P(None, None, "fsdp")}, adapter

three = jax.make_mesh((3,), ("tp",), devices=jax.devices()[:3])
specs = {weight.path: weight_sharding(three)(weight).spec for weight in weight_table(source.config)}
assert specs["embed_tokens.embedding"] == P("tp", None), specs  # 96 rows of vocabulary
assert specs["layers.0.self_attn.q_proj.kernel"] == P(None, None)  # 64 columns do not divide by 3
three = jax.make_mesh((3, 1), ("fsdp", "tp"), devices=jax.devices()[:3])
undivided = ShardingRules().adapter_specs(source.config, AdapterConfig(3, 8), three)
assert undivided["mlp"]["up_proj"]["b"] == P(None, None, "tp"), undivided  # nor do 64
"""


def test_weights_load_sharded_as_their_axes_say() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SCRIPT, str(GOLDEN / "qwen3_untied")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
