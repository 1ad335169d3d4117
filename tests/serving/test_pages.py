"""Page accounting: no page is lost, doubled, or shared but by requests that begin with the same tokens."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from idlm_jax.decoding.cache import BIN
from idlm_jax.errors import UserError
from idlm_jax.serving.pages import Pages

PAGE = 2
# Few tokens and short texts, so that many requests begin alike.
TOKENS = st.lists(st.integers(0, 1), max_size=9)


class Accounts(RuleBasedStateMachine):
    """Requests come, grow, publish and end in any order, beside a model of what every page holds."""

    @initialize(count=st.integers(2, 9))
    def open(self, count: int) -> None:
        self.pages, self.count, self.next = Pages(count, PAGE), count, 0
        # The tokens of each request whose keys are stored.
        self.requests: dict[int, list[int]] = {}
        # What the device would hold: the text up to the end of a page, whose keys it holds.
        self.content: dict[int, tuple[int, ...]] = {}

    def write(self, request: int, first: int) -> None:
        """Store a request's keys from page ``first`` on, as prefill and rounds do."""
        tokens = self.requests[request]
        for index, number in enumerate(self.pages.of(request)):
            if index >= first:
                self.content[number] = tuple(tokens[: (index + 1) * PAGE])

    @rule(tokens=TOKENS, more=st.integers(0, 2), spare=st.integers(0, 2))
    def begin(self, tokens: list[int], more: int, spare: int) -> None:
        count, available = self.pages.pages_for(len(tokens)) + more, self.pages.available
        reused = self.pages.begin(self.next, tokens, count, spare)
        if reused is None:
            assert count + spare > available or available < self.count - 1
            assert self.pages.available == available
            with pytest.raises(KeyError):
                self.pages.of(self.next)
            return
        assert len(self.pages.of(self.next)) == count
        assert self.pages.available >= spare
        assert reused * PAGE <= len(tokens)
        for index, number in enumerate(self.pages.of(self.next)[:reused]):
            assert self.content[number] == tuple(tokens[: (index + 1) * PAGE])
        self.requests[self.next] = tokens
        self.write(self.next, reused)
        self.next += 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), tokens=TOKENS, count=st.integers(0, 4))
    def extend(self, data: Any, tokens: list[int], count: int) -> None:
        request = data.draw(st.sampled_from(sorted(self.requests)))
        before, available = self.pages.of(request), self.pages.available
        given = self.pages.extend(request, count)
        assert given == (count <= available)
        assert self.pages.of(request)[: len(before)] == before
        assert len(self.pages.of(request)) == len(before) + (count if given else 0)
        old = self.requests[request]
        self.requests[request] = (old + tokens)[: PAGE * len(self.pages.of(request))]
        self.write(request, len(old) // PAGE)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def publish(self, data: Any) -> None:
        request = data.draw(st.sampled_from(sorted(self.requests)))
        tokens = self.requests[request]
        self.pages.publish(request, tokens)
        assert len(self.pages._known(tokens)) == len(tokens) // PAGE

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        request = data.draw(st.sampled_from(sorted(self.requests)))
        alone = [
            n for n in self.pages.of(request) if not any(n in self.pages.of(o) for o in self.requests if o != request)
        ]
        available = self.pages.available
        del self.requests[request]
        self.pages.release(request)
        assert self.pages.available == available + len(alone)

    @invariant()
    def accounts_balance(self) -> None:
        if not hasattr(self, "pages"):
            return
        self.pages.check()
        given = {number for request in self.requests for number in self.pages.of(request)}
        assert BIN not in given
        assert self.pages.available + len(given) == self.count - 1

    @invariant()
    def every_request_finds_its_own_keys_in_its_pages(self) -> None:
        for request, tokens in getattr(self, "requests", {}).items():
            for index, number in enumerate(self.pages.of(request)[: len(tokens) // PAGE]):
                assert self.content[number] == tuple(tokens[: (index + 1) * PAGE])

    def teardown(self) -> None:
        for request in getattr(self, "requests", {}):
            self.pages.release(request)
        if hasattr(self, "pages"):
            self.pages.check()
            assert self.pages.begin("all", [], self.count - 1) == 0


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def published(pages: Pages, request: str, tokens: list[int]) -> tuple[int, ...]:
    """Begin, publish and release; the pages it had."""
    assert pages.begin(request, tokens, pages.pages_for(len(tokens))) is not None
    pages.publish(request, tokens)
    numbers = pages.of(request)
    pages.release(request)
    return numbers


def test_the_cached_pages_left_first_are_evicted_first_and_the_end_of_a_text_before_its_beginning() -> None:
    pages = Pages(6, PAGE)
    older, newer = [1, 2, 3, 4, 5, 6], [7, 7, 8, 8]
    first, second = published(pages, "a", older), published(pages, "b", newer)
    assert pages.begin("c", [], 1) == 0 and pages.of("c") == (first[2],)
    # Finding pages makes them the last to be evicted.
    assert published(pages, "d", older[:4]) == first[:2]
    assert pages.begin("e", [], 2) == 0 and pages.of("e") == (second[1], second[0])
    assert pages.begin("f", older, 3) is None
    assert pages.begin("f", older, 2) == 2 and pages.of("f") == first[:2]


def test_a_partly_filled_page_is_never_shared() -> None:
    pages = Pages(8, PAGE)
    published(pages, "a", [1, 2, 3])
    assert pages.begin("b", [1, 2, 3, 4], 2) == 1
    # Neither is one that the request has no pages for.
    assert pages.begin("c", [1, 2, 3, 4], 0) == 0


def test_nonsense_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 pages"):
        Pages(1)
    pages = Pages(4)
    assert pages.most == 3
    pages.begin("a", [], 1)
    with pytest.raises(ValueError, match="'a' has pages already"):
        pages.begin("a", [], 1)
    with pytest.raises(KeyError):
        pages.release("b")
