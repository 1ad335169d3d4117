"""Texts decoded on simulated devices are those decoded on one: heads, vocabulary and requests split."""

from tests.support import run_check


def test_texts_on_a_mesh_equal_those_of_one_device():
    assert run_check("tests.decoding.mesh_check").count("ok") == 4  # pages and three cases


def test_the_forward_pass_by_few_launches_on_a_mesh_is_the_model_on_one_device():
    assert run_check("tests.decoding.forward_mesh_check").count("ok") == 12
