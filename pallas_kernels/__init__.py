"""Operations that carry the speed, one folder each: a pure-jnp reference (the oracle), and kernels for GPU and TPU."""
