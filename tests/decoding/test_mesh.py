"""Texts decoded on simulated devices are those decoded on one: heads, vocabulary and requests split."""

from tests.support import run_check


def test_texts_on_a_mesh_equal_those_of_one_device():
    assert run_check("tests.decoding.mesh_check").count("ok") == 4  # pages and three cases
