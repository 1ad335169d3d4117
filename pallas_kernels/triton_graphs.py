"""Triton kernels as parts of CUDA graphs.

XLA records custom calls of the typed interface alone into its command buffers, and jax-triton lowers to that one only
since release 0.4: a kernel between two products would break the graph of a decode step there. jax has registered the
typed call since 0.11, and it takes the same description of the kernel.
"""

from functools import cache
from typing import Any

from jax.interpreters import mlir
from jax_triton import triton_lib
from jaxlib.mlir import ir

_TYPED_INTERFACE = 4


@cache
def use_typed_calls() -> None:
    """Lower every later ``jax_triton.triton_call`` to the typed custom call."""
    mlir.register_lowering(triton_lib.triton_kernel_call_p, _lower, platform="cuda")


def _lower(ctx: mlir.LoweringRuleContext, *arguments: Any, **parameters: Any) -> Any:
    results = triton_lib.triton_kernel_call_lowering(triton_lib.get_cuda_backend, ctx, *arguments, **parameters)
    call = results[0].owner
    call.attributes["call_target_name"] = ir.StringAttr.get("triton_kernel_call_ffi")
    call.attributes["api_version"] = mlir.i32_attr(_TYPED_INTERFACE)
    call.attributes["backend_config"] = ir.DictAttr.get({"opaque": call.attributes["backend_config"]})
    return results
