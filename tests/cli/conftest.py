"""Fixtures of the tests of the command line."""

import pytest

from tests.cli.decoding_support import Script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Answers come from a script, at once."""
    scripted = Script()
    monkeypatch.setattr("idlm_jax.model.Decoding", scripted)
    return scripted
