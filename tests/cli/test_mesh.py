"""The verbs that decode say on several simulated devices what they say on one; what devices do not allow is refused."""

from pathlib import Path

import pytest

from tests.cli.decoding_support import TINY, refused
from tests.support import run_check


def test_texts_and_documents_over_several_devices_are_those_of_one(tmp_path: Path) -> None:
    assert run_check("tests.cli.mesh_check", tmp_path).split() == ["layout", "generate", "synthesize"]


@pytest.mark.parametrize(
    ("verb", "flags", "said"),
    [
        (("generate", TINY, "--prompt", "12"), ("--tp", 2), "tp must be 1, not 2 (key heads: 2, devices: 1)"),
        (("generate", TINY, "--prompt", "12"), ("--tp", 0), "tp must be 1, not 0 (key heads: 2, devices: 1)"),
        (("chat", TINY), ("--tp", 3), "tp must be 1, not 3 (key heads: 2, devices: 1)"),
        (("serve", "--model", TINY), ("--tp", 2), "tp must be 1, not 2 (key heads: 2, devices: 1)"),
        (
            ("data", "synthesize", TINY, "--output", "there", "--documents", 1),
            ("--data-parallel", 3),
            "data_parallel must be 1, not 3 (devices: 1, tp: 1)",
        ),
        (
            ("eval", "tasks", TINY, "--tasks", "ifeval", "--output", "there"),
            ("--data-parallel", 2),
            "data_parallel must be 1, not 2 (devices: 1, tp: 1)",
        ),
    ],
    ids=lambda value: " ".join(map(str, value[:2])) if isinstance(value, tuple) else None,
)
def test_more_than_heads_and_devices_allow_is_refused(
    verb: tuple[object, ...], flags: tuple[object, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *verb, *flags) == f"idlm: error: {said}\n"
