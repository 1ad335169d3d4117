"""Steps of a small Qwen3 compiled for accelerators that are not there."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from jax.sharding import AxisType

from idlm_jax.backbone.sharding import device_mesh
from idlm_jax.checkpoint.source import Configuration
from idlm_jax.checkpoint.summary import read_config
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.planning.decoding import Workload, plan_decoding
from idlm_jax.planning.targets import parse_target
from idlm_jax.planning.training import plan_training
from idlm_jax.training.config import MeshSettings, Stage, TrainConfig

MODEL = read_config(Path(__file__).parents[2] / "configs" / "models" / "qwen3-0.6b.yaml").replace(num_hidden_layers=2)
NAMES = {"v5e-4": "libtpu", "h100x4": "jax_cuda13_plugin"}
pytestmark = pytest.mark.aot


@pytest.fixture(params=NAMES)
def target(request):
    if find_spec(NAMES[request.param]) is None:
        pytest.skip(f"needs {NAMES[request.param]}")
    return parse_target(request.param)


def test_a_training_step_has_the_traffic_that_its_mesh_needs(target):
    config = TrainConfig("", (), "", mode="full", stages=(Stage(10),), length=1024, batch_size=4, mask_token="151000")
    report = plan_training(config, target, Configuration(Path("model.yaml"), MODEL), MeshSettings(1, 4, 1))
    assert report.fits and report.seconds.bound
    # Parameters in float32 and their moments, a quarter each; in every step they are gathered in bfloat16 at least
    # twice by layer, and gradients come back.
    assert report.given["optimizer"] == pytest.approx(2 * report.given["weights"], rel=0.01)
    layers = 2 * 15_730_000
    assert report.collectives["all-gather"].sent > 2 * layers * 2 * 3 // 4
    back = sum(report.collectives[kind].sent for kind in ("reduce-scatter", "all-reduce") if kind in report.collectives)
    assert back > layers * 2 * 3 // 4


def test_a_round_of_decoding_exchanges_sums_and_logits(target):
    work = Workload(DecodeConfig(stride=4).policy(), 16, 1000)
    report = plan_decoding(MODEL, work, target, 2)
    rows = 8 * 16
    assert report.fits and report.mesh == "data=2 tp=2"
    assert report.collectives["all-to-all"].sent == rows * (151_936 // 2) * 4 // 2
    assert report.collectives["all-reduce"].sent >= 4 * rows * 1024 * 2
    alone = plan_decoding(MODEL, work, parse_target(f"{target.name[:-1]}1"), 1)
    assert not alone.collectives and alone.given["KV cache"] == 4 * report.given["KV cache"]
    assert replace(report, available=report.total - 1).fits is False


def test_an_axis_may_be_part_of_a_side_of_the_torus():
    if find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    mesh = device_mesh((1, 32, 2), parse_target("v5p-64").devices())  # 4 × 4 × 4 chips
    assert dict(mesh.shape) == {"data": 1, "fsdp": 32, "tp": 2}
    assert len(set(mesh.devices.flat)) == 64 and mesh.axis_types == (AxisType.Explicit,) * 3
