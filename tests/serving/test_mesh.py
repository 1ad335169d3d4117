"""The engine over two simulated devices passes its own tests, and serves from its thread."""

from tests.support import run_check


def test_the_engine_gives_on_two_devices_what_it_gives_on_one() -> None:
    said = run_check("tests.serving.mesh_check")
    assert "4 passed" in said
    assert "1 passed" in said  # again, by few launches a layer
