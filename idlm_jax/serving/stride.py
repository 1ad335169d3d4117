"""Which stride and layout a call of rounds decodes by: the one that emits most tokens a second at the present load.

More window rows cost little while a round is bound by reading the weights, and much once it is bound by arithmetic.
What a round costs is measured when the engine starts; how many drafts are accepted, all the time. AR (stride 1) is
always among the candidates, so that decoding is slower than AR by no more than the error of this estimate.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from idlm_jax.decoding.step import Policy
from idlm_jax.decoding.window import LAYOUTS

# The chance that a draft is accepted, given those before it, until something else was seen.
_EXPECTED = 0.8
# So many rounds that verified drafts later, half of what was seen before is forgotten.
_MEMORY = 512
# Share of what is expected in what was seen that comes back with every call by AR, which sees nothing: sooner or later
# drafts are tried again.
_HOPE = 0.001
# Share by which another way must be faster than the present one, so that noise does not switch.
_MARGIN = 0.03
# A window whose round takes no longer than so many rounds of AR is as good as free.
_FREE = 1.25


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
        # Seconds a round, by requests a call, and by policy.
        self._seconds: dict[int, dict[Policy, float]] = {}
        depth = np.arange(1, max(policy.stride for policy in policies))
        self._expected = _EXPECTED**depth
        # Rounds that accepted the first k drafts, and those that had so many to verify; weighted by age.
        self._accepted, self._verified = _MEMORY * self._expected, np.full(len(depth), float(_MEMORY))
        self._last = self.policies[0]

    def worth_measuring(self, requests: int, policy: Policy) -> bool:
        """Whether a way can be the best for so many requests, by what those before it were found to cost."""
        seconds = self._seconds.get(requests, {})
        if len(seconds) < 2:
            return True
        ar, widest = (seconds[policy] for policy in self.policies[:2])
        free = widest <= _FREE * ar
        # Where windows are free, none but the widest can be best; where they cost, branches cost too much.
        return free if policy.layout.name == "branch" else not free

    def measured(self, requests: int, policy: Policy, seconds: float) -> None:
        """A round of so many requests takes so long."""
        self._seconds.setdefault(requests, {})[policy] = seconds

    def observe(self, policy: Policy, history: Int[np.ndarray, " rounds"]) -> None:
        """Learn from rounds: how many drafts each accepted, -1 if it had none to verify."""
        verified = history[history >= 0]
        if not verified.size:
            return
        depth = np.arange(1, policy.stride)
        keep, seen = 0.5 ** (verified.size / _MEMORY), slice(policy.stride - 1)
        self._accepted[seen] = keep * self._accepted[seen] + np.sum(verified[:, None] >= depth, axis=0)
        self._verified[seen] = keep * self._verified[seen] + verified.size

    @property
    def acceptance(self) -> tuple[float, ...]:
        """P_k: the share of verifying rounds that accepted the first k drafts, lately."""
        # Deeper ones may be of longer ago, when more was accepted.
        return tuple(np.minimum.accumulate(self._accepted / self._verified).tolist())

    def choose(self, requests: int) -> Policy:
        """The policy for a call of so many requests, one of the numbers that were measured."""
        seconds = self._seconds.get(requests)
        if not seconds:
            return self.policies[0]
        acceptance = self.acceptance
        speeds = {
            policy: policy.layout.tokens_per_forward(acceptance[: policy.stride - 1]) / cost
            for policy, cost in seconds.items()
        }
        best = max(speeds, key=lambda policy: speeds[policy])
        if speeds[best] > (1 + _MARGIN) * speeds.get(self._last, 0.0):
            self._last = best
        if self._last.stride == 1:
            self._accepted += _HOPE * (self._expected * self._verified - self._accepted)
        return self._last
