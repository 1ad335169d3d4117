"""Operations that carry the speed, one folder each: a pure-jnp reference (the oracle), and kernels for GPU and TPU."""

# What a user chooses: the best implementation that runs here, or plain JAX everywhere.
KERNELS = ("auto", "xla")

# Whether "auto" takes the kernels, those for GPUs and those for TPUs. scripts/check_kernels.py must pass on an H100.
BY_DEFAULT: bool = True
