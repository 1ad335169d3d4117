"""Operations that carry the speed, one folder each: a pure-jnp reference (the oracle), and kernels for GPU and TPU."""

# What a user chooses: the best implementation that runs here, or plain JAX everywhere.
KERNELS = ("auto", "xla")

# Whether "auto" takes the kernels, those for GPUs and those for TPUs: not before scripts/check_kernels.py has passed on
# an H100. Until then they run when they are asked for by name.
BY_DEFAULT: bool = False
