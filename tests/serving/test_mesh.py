"""The engine over two simulated devices passes its own tests, and serves from its thread."""

from tests.support import run_check


def test_the_engine_gives_on_two_devices_what_it_gives_on_one() -> None:
    assert "4 passed" in run_check("tests.serving.mesh_check")
