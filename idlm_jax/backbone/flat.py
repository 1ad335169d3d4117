"""A model that is quick to hand to compiled programs.

At each call of a program its arguments are taken apart into arrays. For a module of Flax NNX that is Python code for
every variable, which can take longer than a round of a small model.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax

from idlm_jax.backbone.qwen3 import Qwen3


class _Form:
    """What a model is besides its arrays; equal for models of one form, so that they share compiled programs."""

    def __init__(self, tree: Any):
        self.tree, self._hash = tree, hash(tree)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Form) and self.tree == other.tree)

    def __hash__(self) -> int:
        return self._hash


@jax.tree_util.register_pytree_node_class
class _Flat:
    def __init__(self, leaves: Sequence[jax.Array], form: _Form):
        self._parts = tuple(leaves), form

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], _Form]:
        return self._parts

    @classmethod
    def tree_unflatten(cls, form: _Form, leaves: Sequence[Any]) -> Qwen3:
        return jax.tree.unflatten(form.tree, leaves)


def flat(model: Qwen3) -> Qwen3:
    """The same model as an argument of compiled programs, of no other use; inside of them it is the model itself."""
    leaves, tree = jax.tree.flatten(model)
    return cast("Qwen3", _Flat(leaves, _Form(tree)))
