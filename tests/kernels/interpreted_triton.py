"""Triton kernels on the CPU: what ``jax_triton.triton_call`` launches is run by Triton's own interpreter instead."""

import os
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

HAS_TRITON = bool(find_spec("triton") and find_spec("jax_triton"))
ON_GPU = jax.default_backend() == "gpu"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before Triton is imported
# For a fixture that calls ``interpret`` where it is "interpreted".
MODES = [
    pytest.param("interpreted", marks=pytest.mark.skipif(ON_GPU or not HAS_TRITON, reason="needs Triton, and no GPU")),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


class _Storage:
    def __init__(self, values):
        self.values = values

    def data_ptr(self):
        return self.values.ctypes.data

    def cpu(self):
        return self

    def copy_(self, other):
        assert other.values is self.values


class _Tensor:
    """A numpy array with what the interpreter asks of a torch tensor; it reads and writes the array's own memory."""

    def __init__(self, values):
        self.values, self.dtype = values, values.dtype.name

    def data_ptr(self):
        return self.values.ctypes.data

    def untyped_storage(self):
        return _Storage(self.values)

    def new_empty(self, _size, device):
        return _Tensor(self.values)

    def set_(self, storage, _offset, _size, _stride):
        self.values = storage.values

    def storage_offset(self):
        return 0

    def size(self):
        return self.values.shape

    def stride(self):
        return self.values.strides


def _poison(shape):
    dtype = np.dtype(shape.dtype)
    return np.full(shape.shape, np.nan if jnp.issubdtype(dtype, jnp.floating) else np.iinfo(dtype).max, dtype)


def interpret(monkeypatch: pytest.MonkeyPatch, launcher: ModuleType, kernels: ModuleType) -> None:
    """Make ``launcher`` run the functions of the module ``kernels`` by the interpreter; outputs begin as NaN.

    Triton itself must have been imported with TRITON_INTERPRET=1 in the environment.
    """
    from triton.language import core
    from triton.runtime.interpreter import TensorHandle

    def log1p(x):
        return core.tensor(TensorHandle(np.log1p(x.handle.data), x.handle.dtype), x.type)

    if hasattr(kernels, "libdevice"):
        monkeypatch.setattr(kernels, "libdevice", SimpleNamespace(log1p=log1p))

    def triton_call(*arguments, kernel, out_shape, grid, num_warps, input_output_aliases=None, **constants):
        shapes, tree = jax.tree.flatten(out_shape)
        outputs = [_poison(shape) for shape in shapes]
        inputs = [np.array(argument, order="C") for argument in arguments]
        for source, target in (input_output_aliases or {}).items():
            outputs[target] = inputs[source]
        with np.errstate(all="ignore"):
            kernel[grid](*map(_Tensor, [*inputs, *outputs]), **constants)
        return jax.tree.unflatten(tree, [jnp.asarray(output) for output in outputs])

    monkeypatch.setattr(launcher.jax_triton, "triton_call", triton_call)
