"""Planning without any accelerator: what targets are called, what is counted in a program, and memory by kind."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from idlm_jax.config import ModelConfig
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.errors import UserError
from idlm_jax.planning import targets
from idlm_jax.planning.decoding import Workload, proposed_tp
from idlm_jax.planning.hlo import Program, Traffic, array_bytes, group_size
from idlm_jax.planning.report import Report, Seconds, _needed
from idlm_jax.planning.targets import CHIPS, parse_target
from idlm_jax.planning.training import model_of, proposed
from idlm_jax.training.config import MeshSettings, Stage, TrainConfig, load_train_config
from tests.decoding.support import tiny_config

ROOT = Path(__file__).parents[2]


def test_traffic_and_memory_on_eight_simulated_devices_are_those_counted_by_hand():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "tests.planning.mesh_check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"


@pytest.mark.parametrize(
    ("name", "platform", "count", "topology"),
    [("h100x8", "gpu 9.0", 8, "1x1x8"), ("v5e-16", "tpu", 16, "4x4"), ("V5P-64", "tpu", 64, "4x4x4")],
)
def test_targets_are_a_kind_and_a_number_of_chips(name, platform, count, topology):
    target = parse_target(name)
    assert (target.name, target.chip.platform, target.count) == (name.lower(), platform, count)
    assert target.chip.topologies[count] == topology


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("h10x8", "did you mean 'h100'"),
        ("v7e-8", "did you mean 'v6e'|did you mean 'v5e'"),
        ("h100-8", "did you mean 'h100x8'"),
        ("v5e", "did you mean 'v5e-256'"),
        ("v5ex16", "did you mean 'v5e-256'"),
        ("h100x3", "GPUs of one host can be 1, 2, 4, 8"),
        ("v5p-1", "chips of a slice can be 4, 8"),
        ("", "such as h100x8"),
    ],
)
def test_what_is_no_target_is_refused_with_what_is(name, said):
    with pytest.raises(UserError, match=said):
        parse_target(name)


@pytest.mark.parametrize(("name", "extra"), [("h100x8", "gpu"), ("v5e-16", "tpu")])
def test_a_missing_compiler_names_the_extra(name, extra, monkeypatch):
    monkeypatch.setattr(targets, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"{name}.*pip install 'idlm-jax\[{extra}\]'"):
        parse_target(name).devices()


def test_every_topology_has_as_many_chips_as_it_says():
    for chip in CHIPS.values():
        for count, topology in chip.topologies.items():
            sides = [int(side) for side in topology.split("x")]
            assert count == sides[0] * sides[1] * (sides[2] if len(sides) == 3 else 1)


def test_bytes_of_types_in_main_memory_and_on_the_chip():
    text = "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0:T(128)}, pred[], s4[8], f8e4m3fn[16], /*index=5*/u32[]{:S(2)})"
    assert array_bytes(text) == 12 + 16 + 1 + 4 + 16 + 4
    assert array_bytes(text, everywhere=False) == 16 + 1 + 4 + 16


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4,'tp'=3] {'fsdp','tp'}", 12),
        ("replica_groups={}", 8),
    ],
)
def test_devices_of_a_collective_in_every_notation(groups, size):
    assert group_size(f"channel_id=1, {groups}, dimensions={{0}}", 8) == size


# As XLA writes for TPUs: trips said by the condition alone, an all-gather that runs beside two fusions, an all-reduce
# of which a device keeps its part, and arrays on the chip.
TPU = """HloModule step, is_scheduled=true

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%begins (a: f32[2,4]) -> f32[8,4] {
  %a = f32[2,4]{1,0} parameter(0)
  %all-gather.1 = f32[8,4]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="1"}
  ROOT %start = (f32[2,4]{1,0}, f32[8,4]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (b: f32[2,4]) -> f32[8,4] {
  %b = f32[2,4]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[8,4]{1,0} all-gather(%b), replica_groups=[2,4]<=[8], frontend_attributes={chain_id="1"}
}

%all-reduce-scatter.5 (c: f32[8,4]) -> f32[2,4] {
  %c = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.5 = f32[8,4]{1,0} all-reduce(%c), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[2,4]{1,0} dynamic-slice(%all-reduce.5, %zero, %zero), dynamic_slice_sizes={2,4}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.2 = (s32[]{:T(128)}, f32[8,4]{1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %whole = f32[8,4]{1,0} get-tuple-element(%p.2), index=1
  %part = f32[2,4]{1,0:S(1)} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.5
  %first = (f32[2,4]{1,0}, f32[8,4]{1,0}) fusion(%part), kind=kLoop, calls=%begins
  %second = f32[8,4]{1,0} fusion(%part), kind=kLoop, calls=%goes_on
  ROOT %next = (s32[]{:T(128)}, f32[8,4]{1,0}) tuple(%i.2, %second)
}

ENTRY %main (q: f32[8,4]) -> f32[8,4] {
  %q = f32[8,4]{1,0} parameter(0)
  %start_at = s32[] constant(0)
  %both = (s32[], f32[8,4]{1,0}) tuple(%start_at, %q)
  %loop = (s32[], f32[8,4]{1,0}) while(%both), condition=%condition, body=%body
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_collective_counts_once_a_round_however_many_fusions_it_runs_beside():
    sent = 8 * 4 * 4 * 3 // 4
    wanted = {"all-gather": Traffic(6, 6 * sent), "reduce-scatter": Traffic(6, 6 * sent)}
    assert Program(TPU, 8).collectives() == wanted
    unbounded = TPU.replace("direction=LT", "direction=NE")
    assert Program(unbounded, 8).collectives()["all-gather"] == Traffic(1, sent), "nobody knows how often"


def test_bytes_moved_leave_out_memory_on_the_chip_and_what_is_not_touched():
    once = 128 + (0 + 32 + 128) + (0 + 128)  # scattered into the chip; gathered from it, beside what it came from
    assert Program(TPU, 8).moved_bytes() == 6 * once
    slices = """ENTRY %main (a: f32[64,100], n: s32[]) -> f32[64,100] {
  %a = f32[64,100]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,100]{1,0} dynamic-slice(%a, %n, %zero), dynamic_slice_sizes={1,100}
  %changed = f32[64,100]{1,0} fusion(%a, %row, %n), kind=kLoop, calls=%update
  ROOT %kernel = f32[64,100]{1,0} custom-call(%changed, %row, %row), output_to_operand_aliasing={{}: (0, {})}
}

%update (b: f32[64,100], r: f32[1,100], m: s32[]) -> f32[64,100] {
  %b = f32[64,100]{1,0} parameter(0)
  %r = f32[1,100]{1,0} parameter(1)
  %m = s32[] parameter(2)
  %nothing = s32[] constant(0)
  ROOT %u = f32[64,100]{1,0} dynamic-update-slice(%b, %r, %m, %nothing)
}
"""
    assert Program(slices, 1).moved_bytes() == 2 * 400 + (400 + 4 + 400) + 400
    fetched = """ENTRY %main (a: f32[64,100]) -> f32[8,100] {
  %a = f32[64,100]{1,0} parameter(0)
  %begun = ((f32[64,100]{1,0}), f32[8,100]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:8], [0:100]}
  %done = f32[8,100]{1,0:S(1)} slice-done(%begun)
  ROOT %copied = f32[8,100]{1,0} copy(%done)
}
"""
    assert Program(fetched, 1).moved_bytes() == 3200 + 3200
    there_and_back = """ENTRY %main (a: f32[8,100]) -> f32[8,100] {
  %a = f32[8,100]{1,0} parameter(0)
  %begun = (f32[8,100]{1,0:S(1)}, f32[8,100]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %here = f32[8,100]{1,0:S(1)} copy-done(%begun)
  %back = (f32[8,100]{1,0}, f32[8,100]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%here)
  ROOT %done = f32[8,100]{1,0} copy-done(%back)
}
"""
    assert Program(there_and_back, 1).moved_bytes() == 3200 + 3200


def test_a_report_says_what_bounds_a_step_and_whether_it_fits():
    seconds = Seconds(compute=0.1, memory=0.3, links=0.2)
    assert (seconds.bound, seconds.estimate) == ("memory", 0.3)
    report = Report("v5e-4", "tp=4", 8, {"weights": 5}, 4, 9, 10, {"all-gather": Traffic(1, 2)}, seconds)
    assert report.fits and not replace(report, available=8).fits
    plain = report.as_dict()
    assert plain["fits"] and plain["seconds"]["bound"] == "memory"
    assert plain["collectives"] == {"all-gather": {"count": 1, "sent": 2}}


def test_what_a_compiler_says_of_a_program_that_is_too_large_is_read():
    said = "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 31.50G of 15.75G hbm."
    assert _needed(said) == int(31.5 * 2**30)
    assert _needed("total memory required for HLO temporaries (34.73G) exceeds available HBM") == int(34.73 * 2**30)
    assert _needed("Mosaic failed to compile") is None


def test_a_mesh_is_proposed_with_as_little_tensor_parallelism_as_the_rows_leave():
    config = TrainConfig("", (), "", stages=(Stage(1),), batch_size=32)
    model = tiny_config(num_attention_heads=16, num_key_value_heads=8)
    assert proposed(config, model, 8).mesh == MeshSettings()
    assert proposed(config, model, 64).mesh == MeshSettings(tp=2)
    with pytest.raises(UserError, match="32 rows cannot be split over 512 devices"):
        proposed(config, model, 512)


def test_decoding_splits_the_model_as_little_as_memory_allows():
    hf = {
        "model_type": "qwen3", "vocab_size": 150_000, "hidden_size": 5120, "intermediate_size": 25_600,
        "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
    }  # fmt: skip
    model = ModelConfig.from_hf(hf)  # 65 GB of weights, 69 GB of cache
    work = Workload(DecodeConfig(stride=4).policy(), 64, 4096)
    assert [proposed_tp(model, work, parse_target(name)) for name in ("h100x8", "v5e-16", "v6e-8")] == [2, 8, 4]
    with pytest.raises(UserError, match="a batch of 3 cannot be split"):
        proposed_tp(model, replace(work, batch=3), parse_target("v5e-16"))


def test_a_model_that_is_not_there_is_taken_from_its_description():
    path = ROOT / "configs" / "train" / "qwen3-8b_gated_lora_r128.yaml"
    config, source = model_of(load_train_config(path), path)
    assert source.config.hidden_size == 4096 and config.mask_token == "151935"
    with pytest.raises(UserError, match="no tokenizer"):
        source.tokenizer()
