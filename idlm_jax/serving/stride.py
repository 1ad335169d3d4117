"""Which stride and layout a call of rounds decodes by: the one that emits most tokens a second at the present load.

More window rows cost little while a round is bound by reading the weights, and much once it is bound by arithmetic.
What a round costs is measured when the engine starts; how many drafts are accepted, all the time. AR (stride 1) is
always among the candidates, so that decoding is slower than AR by no more than the error of this estimate.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from jaxtyping import Int

from idlm_jax.decoding.step import Policy
from idlm_jax.decoding.window import LAYOUTS, window_rows

# The chance that a draft is accepted, given those before it, until something else was seen.
_EXPECTED = 0.8
# So many verified drafts of a depth later, half of what was seen of it before is forgotten.
_MEMORY = 512
# With every call that has no drafts of a depth, the chance there comes nearer to 1 by this share: what has not been
# seen for minutes is tried again, which costs about a hundredth of the speed.
_HOPE = 0.0002
# Share by which another way must be faster than the present one, so that noise does not switch; AR need not.
_MARGIN = 0.03
# Share by which a way must be able to beat those that are measured, so that it is compiled and measured, too.
_WORTH = 0.05
# What may be accepted, for that: the chance of the first draft, and that of each further one as a share of the last.
_CHANCES, _DECAYS = np.linspace(0.05, 1, 20), (1.0, 0.85, 0.7)


def candidates(policy: Policy) -> list[Policy]:
    """Every way up to a policy's stride: AR first, then standard layouts from the widest on, then branch."""
    standard, branch = LAYOUTS["standard"], LAYOUTS["branch"]
    strides = [1, *range(policy.stride, 1, -1)]
    ways = [replace(policy, stride=stride, layout=standard) for stride in strides]
    return ways if policy.stride == 1 else [*ways, replace(policy, layout=branch)]


class StrideChooser:
    """Measured costs and acceptance, and the choice that follows."""

    def __init__(self, policies: Sequence[Policy]):
        """As ``candidates`` gives them, or one; the first is used where no cost is known."""
        self.policies = tuple(policies)
        # Those that may be chosen now.
        self.allowed: Collection[Policy] = self.policies
        # Seconds a round, by requests a call, and by policy.
        self._seconds: dict[int, dict[Policy, float]] = {}
        # By depth: the chance that a draft is accepted, given those before it.
        self._chance = np.full(max(policy.stride for policy in policies) - 1, _EXPECTED)
        self._last = self.policies[0]

    def worth_measuring(self, requests: int, policy: Policy) -> bool:
        """Whether a way can be clearly the best for so many requests, by what others were found to cost.

        Taken as known: more rows never cost less, and each further one costs no less than those before it, as where a
        round waits for memory first and for arithmetic later. Then what is left out is faster than the best of the
        others by 7 % at most (tests/serving/test_stride.py).
        """
        seconds = self._seconds.get(requests, {})
        if len(seconds) < 2:
            return True
        least = _least_seconds(seconds, policy)
        return any(
            _speed(policy, least, prefix)
            > (1 + _WORTH) * max(_speed(way, cost, prefix) for way, cost in seconds.items())
            for prefix in _profiles(len(self._chance))
        )

    def measured(self, requests: int, policy: Policy, seconds: float) -> None:
        """A round of so many requests takes so long."""
        self._seconds.setdefault(requests, {})[policy] = seconds

    def observe(self, policy: Policy, history: Int[np.ndarray, "*rounds"]) -> None:
        """Learn from rounds: how many drafts each accepted, -1 if it had none to verify."""
        for depth in range(policy.stride - 1):
            tried, accepted = np.count_nonzero(history >= depth), np.count_nonzero(history > depth)
            if not tried:
                break
            keep = 0.5 ** (tried / _MEMORY)
            self._chance[depth] = keep * self._chance[depth] + (1 - keep) * accepted / tried

    @property
    def acceptance(self) -> tuple[float, ...]:
        """P_k: the share of verifying rounds that accept the first k drafts, as far as it is known."""
        return tuple(np.cumprod(self._chance).tolist())

    def choose(self, requests: int) -> Policy:
        """The policy for a call of so many requests, one of the numbers that were measured."""
        seconds = self._seconds.get(requests)
        if not seconds:
            return self.policies[0]
        acceptance = self.acceptance
        speeds = {way: _speed(way, cost, acceptance) for way, cost in seconds.items() if way in self.allowed}
        best = max(speeds, key=lambda policy: speeds[policy])
        margin = 0.0 if best.stride == 1 else _MARGIN
        if speeds[best] > (1 + margin) * speeds.get(self._last, 0.0):
            self._last = best
        unseen = self._chance[self._last.stride - 1 :]
        unseen += _HOPE * (1 - unseen)
        return self._last


def _speed(policy: Policy, seconds: float, prefix: Sequence[float]) -> float:
    """Tokens of a request a second."""
    return policy.layout.tokens_per_forward(prefix[: policy.stride - 1]) / seconds


def _rows(policy: Policy) -> int:
    return window_rows(policy.layout, policy.stride)


def _least_seconds(seconds: Mapping[Policy, float], policy: Policy) -> float:
    """A bound on the cost of a way, from those that are known."""
    rows = _rows(policy)
    least = max(cost for way, cost in seconds.items() if _rows(way) <= rows)
    widest = max(seconds, key=_rows)
    more = rows - _rows(widest)
    if more <= 0:
        return least
    slopes = [(seconds[widest] - cost) / (_rows(widest) - _rows(way)) for way, cost in seconds.items() if way != widest]
    # The gentlest: the other differences may be noise.
    return max(least, seconds[widest] + more * min(slopes))


@cache
def _profiles(depth: int) -> list[tuple[float, ...]]:
    """Acceptance that may occur: P_k for so many drafts."""
    each = np.arange(depth)
    return [tuple(np.cumprod(chance * decay**each).tolist()) for chance in _CHANCES for decay in _DECAYS]
