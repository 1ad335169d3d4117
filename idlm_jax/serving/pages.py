"""Who has which page of the key/value cache: a free list, shared pages of common prefixes, and what may be evicted.

Pages are numbers; the keys lie on the device (``idlm_jax.decoding.paged``). A full page of known tokens can be found
again by a hash of its tokens and of all before them (vLLM's prefix cache, arXiv 2309.06180), and serves every request
that begins so; when the last of them has ended it stays until its room is needed. Only the page of the very tokens of
a request's own prefix is shared, and a request writes behind that prefix, so nobody writes to a page of another.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from hashlib import sha256

import numpy as np
from jaxtyping import Int

from idlm_jax.decoding.cache import BIN, PAGE
from idlm_jax.errors import UserError

Tokens = Sequence[int] | Int[np.ndarray, " L"]


class Pages:
    """The pages of one cache, whose keys are all computed with the same weights; callers name requests as they like."""

    def __init__(self, pages: int, page: int = PAGE):
        """``pages`` in all, of ``page`` slots each; page ``BIN`` is nobody's."""
        if pages < 2:
            raise UserError(f"a paged cache needs at least 2 pages, one of which is never given out, not {pages}")
        self.page, self._count = page, pages
        self._free = [number for number in reversed(range(pages)) if number != BIN]
        # The pages of each request in order of its slots, and how many requests have a page.
        self._of_request: dict[Hashable, list[int]] = {}
        self._holders: Counter[int] = Counter()
        # Pages whose tokens are known, both ways.
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        # Those of them that nobody has, the next to be evicted first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """How many pages can still be given out, cached ones that nobody has included."""
        return len(self._free) + len(self._idle)

    @property
    def most(self) -> int:
        """The most pages a request can have."""
        return self._count - 1

    def of(self, request: Hashable) -> tuple[int, ...]:
        """The pages of a request in order of its slots."""
        return tuple(self._of_request[request])

    def pages_for(self, slots: int) -> int:
        """How many pages hold so many slots."""
        return -(-slots // self.page)

    def known(self, tokens: Tokens) -> int:
        """How many pages hold the keys of the longest known beginning of tokens."""
        return len(self._known(tokens))

    def begin(self, request: Hashable, tokens: Tokens, count: int, spare: int = 0) -> int | None:
        """Give a new request ``count`` pages; returns how many of them, the first, hold its tokens' keys already.

        ``tokens`` are those whose keys the request will store first, from slot 0: its prompt without the last, which is
        fed to the first round. None, and nothing changes, where fewer than ``spare`` pages would be left for others.
        """
        if request in self._of_request:
            raise ValueError(f"request {request!r} has pages already")
        shared = self._known(tokens[: count * self.page])
        idle = sum(number in self._idle for number in shared)
        if count - len(shared) + spare > self.available - idle:
            return None
        for number in shared:
            self._idle.pop(number, None)
        self._holders.update(shared)
        self._of_request[request] = [*shared]
        self.extend(request, count - len(shared))
        return len(shared)

    def extend(self, request: Hashable, count: int) -> bool:
        """Give a request ``count`` more pages; False, and nothing changes, where there are too few."""
        pages = self._of_request[request]
        if count > self.available:
            return False
        taken = [self._take() for _ in range(count)]
        self._holders.update(taken)
        pages += taken
        return True

    def publish(self, request: Hashable, tokens: Tokens) -> None:
        """Let others find the pages that ``tokens``, a request's from slot 0 on, fill up.

        Call it when the device has been told to store their keys: whoever reads them is started later.
        """
        for number, key in zip(self._of_request[request], self._keys(tokens), strict=False):
            # Of two requests that computed the same keys side by side, the first is found.
            if key not in self._by_key and number not in self._key_of:
                self._by_key[key], self._key_of[number] = number, key

    def release(self, request: Hashable) -> None:
        """Take a request's pages back; what others may look for stays findable until its room is needed."""
        # From the last on: a page is of no use without those before it, so it is evicted before them.
        for number in reversed(self._of_request.pop(request)):
            self._holders[number] -= 1
            if self._holders[number]:
                continue
            del self._holders[number]
            if number in self._key_of:
                self._idle[number] = None
            else:
                self._free.append(number)

    def check(self) -> None:
        """Raise AssertionError where the accounts contradict each other; for tests."""
        held = Counter(number for pages in self._of_request.values() for number in pages)
        assert held == self._holders, "holders"
        assert all(len(set(pages)) == len(pages) for pages in self._of_request.values()), "a page twice in a request"
        assert all(held[number] == 1 or number in self._key_of for number in held), "a page shared by mistake"
        everywhere = [*self._free, *self._idle, *held]
        assert sorted(everywhere) == [number for number in range(self._count) if number != BIN], (
            "a page lost or doubled"
        )
        assert {number: key for key, number in self._by_key.items()} == self._key_of, "keys"
        assert self._idle.keys() <= self._key_of.keys(), "an idle page that nobody can find"
        assert not self._key_of.keys() & set(self._free), "a free page that somebody can find"

    def _take(self) -> int:
        """A page for a new owner: a free one, else the cached one that was left first."""
        if self._free:
            return self._free.pop()
        number, _ = self._idle.popitem(last=False)
        del self._by_key[self._key_of.pop(number)]
        return number

    def _known(self, tokens: Tokens) -> list[int]:
        """The pages that hold the keys of the longest known prefix of tokens."""
        pages = []
        for key in self._keys(tokens):
            if key not in self._by_key:
                break
            pages.append(self._by_key[key])
        return pages

    def _keys(self, tokens: Tokens) -> Iterator[bytes]:
        """A key for each page that tokens fill up: a hash, with no known collisions, of its tokens and all before."""
        numbers, key = np.asarray(tokens, np.int64), b""
        for end in range(self.page, len(tokens) + 1, self.page):
            key = sha256(key + numbers[end - self.page : end].tobytes()).digest()
            yield key
