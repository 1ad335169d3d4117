"""Train configurations: what a file and overrides become, what is refused and how, and the files we ship."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from idlm_jax.errors import UserError
from idlm_jax.training.config import (
    AdapterSettings,
    MeshSettings,
    OptimizerSettings,
    Stage,
    TrainConfig,
    load_train_config,
    to_yaml,
    validate,
    write_config,
)
from idlm_jax.training.setup import fitting_parts

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))
MINIMAL = {"model": "m", "data": "d", "output": "o", "stages": [{"steps": 10}]}
CONFIG = TrainConfig("m", ("d",), "o", stages=(Stage(10),))
FULL = replace(CONFIG, mode="full")


def write(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}), encoding="utf-8")
    return path


def refused(tmp_path: Path, *overrides: str, **changes: Any) -> str:
    path = write(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        load_train_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def test_a_file_says_only_what_differs(tmp_path: Path) -> None:
    assert load_train_config(write(tmp_path)) == CONFIG


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_starts_with_its_command(path: Path) -> None:
    load_train_config(path)
    assert f"#   idlm train configs/train/{path.name}\n" in path.read_text(encoding="utf-8")


def test_files_are_shipped() -> None:
    assert len(SHIPPED) >= 5


@pytest.mark.parametrize("name", ["smollm2_full", "qwen3-0.6b_full"])
def test_full_conversions_follow_the_official_recipe(name: str) -> None:
    config = load_train_config(SHIPPED[0].with_name(f"{name}.yaml"))
    assert (config.mode, config.schedule_by_stage) == ("full", True)
    assert config.optimizer == OptimizerSettings(learning_rate=1e-5, warmup=0.03)
    assert config.batch_size * config.length == 32 * 4096
    assert [stage.block_size for stage in config.stages] == [1, 2, 3]
    assert [stage.clean_weight for stage in config.stages] == [0.2, 0.2, "auto"]
    assert {(stage.starts, stage.noisy_loss) for stage in config.stages} == {("aligned", "ce")}


def test_the_written_config_reads_back_the_same(tmp_path: Path) -> None:
    config = TrainConfig(
        "a model: with a colon",
        ("d", "e"),
        "o",
        stages=(Stage(3, 1, starts="aligned", clean_weight="auto"), Stage(4, 7, "tv", density=0.5)),
        mode="lora",
        adapter=AdapterSettings(rank=4, alpha=8.0, target_modules=("q_proj",)),
        optimizer=OptimizerSettings(learning_rate=3e-7),
        mask_token="<|MASK|>",
        freeze=("layers.mlp.*",),
        mesh=MeshSettings(2, 1, -1),
        by_document=False,
    )
    write_config(config, tmp_path / "config.yaml")
    assert load_train_config(tmp_path / "config.yaml") == config
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == to_yaml(config)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_overrides_win_and_may_name_what_the_file_leaves_out(tmp_path: Path) -> None:
    overrides = [
        "optimizer.learning_rate=1e-4",
        "stages.0.steps=7",
        "freeze=[a, b]",
        "mask_token=16",
        "mesh={tp: 2}",
        "evaluation.documents=0",
        "adapter.alpha=null",
        "model=a=b",
    ]
    assert load_train_config(write(tmp_path, optimizer={"learning_rate": 1, "clip": 0.5}), overrides) == replace(
        CONFIG,
        model="a=b",
        optimizer=OptimizerSettings(learning_rate=1e-4, clip=0.5),
        stages=(Stage(7),),
        freeze=("a", "b"),
        mask_token="16",
        mesh=MeshSettings(tp=2),
        evaluation=replace(CONFIG.evaluation, documents=0),
    )


def test_numbers_keep_their_type(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    # YAML takes 1e-5 for text, and 1 for a whole number.
    path.write_text(
        "{model: m, data: d, output: o, mode: full, stages: [{steps: 1, clean_weight: 1}], "
        "optimizer: {learning_rate: 1e-5, clip: 2}}"
    )
    config = load_train_config(path)
    assert config.optimizer.learning_rate == 1e-5
    assert isinstance(config.optimizer.clip, float) and isinstance(config.stages[0].clean_weight, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lenght": 8}, "unknown key 'lenght'; did you mean 'length'?"),
        (
            {"optimizer": {"lerning_rate": 1}},
            "unknown key 'optimizer.lerning_rate'; did you mean 'optimizer.learning_rate'?",
        ),
        (
            {"stages": [{"steps": 1}, {"steps": 1, "blok_size": 2}]},
            "unknown key 'stages.1.blok_size'; did you mean 'stages.1.block_size'?",
        ),
        ({"stages": [{"block_size": 2}]}, "'stages.0.steps' is missing"),
        ({"stages": {"steps": 2}}, 'stages: must be a list, not {"steps": 2}'),
        ({"stages": [3]}, "stages.0: must be a mapping of keys to values, not 3"),
        ({"stages": [{"steps": 1.5}]}, "stages.0.steps: must be a whole number, not 1.5"),
        ({"stages": [{"steps": True}]}, "stages.0.steps: must be a whole number, not true"),
        ({"optimizer": {"clip": True}}, "optimizer.clip: must be a number, not true"),
        ({"optimizer": {"clip": "much"}}, 'optimizer.clip: must be a number, not "much"'),
        ({"optimizer": None}, "optimizer: must be a mapping of keys to values, not null"),
        ({"by_document": 1}, "by_document: must be true or false or null, not 1"),
        ({"adapter": {"alpha": "big"}}, 'adapter.alpha: must be a number or null, not "big"'),
        ({"freeze": 3}, "freeze: must be a list, not 3"),
        ({"model": None}, "model: must be text, not null"),
    ],
)
def test_wrong_keys_and_types_are_one_line_with_the_whole_path(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert refused(tmp_path, **changes) == message


def test_a_missing_required_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("{model: m, output: o}")
    with pytest.raises(UserError, match="'data' is missing"):
        load_train_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("length", "'length' is not an override; write KEY=VALUE"),
        ("length=[", "'length=[': the value is not valid YAML"),
        ("stages.1.steps=2", "'stages.1.steps=2': no entry '1' in a list of 1 (the first is 0)"),
        ("stages.steps=2", "'stages.steps=2': no entry 'steps' in a list of 1"),
        ("model.name=x", "'model.name=x': 'name' would be a part of \"m\", which has none"),
        ("optimiser.clip=2", "unknown key 'optimiser'; did you mean 'optimizer'?"),
    ],
)
def test_bad_overrides_are_one_line(tmp_path: Path, override: str, message: str) -> None:
    assert refused(tmp_path, override).startswith(message)


def stage(**changes: Any) -> dict[str, Any]:
    return {"stages": (replace(Stage(10), **changes),)}


def optimizer(**changes: Any) -> dict[str, Any]:
    return {"optimizer": replace(OptimizerSettings(), **changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "gated_lora"}, "mode: unknown 'gated_lora' (one of ar, full, lora, gated-lora); did you mean"),
        (stage(noisy_loss="klx"), "stages.0.noisy_loss: unknown 'klx'"),
        (stage(starts="randon"), "stages.0.starts: unknown 'randon'"),
        ({"noisy_targets": "answers"}, "noisy_targets: unknown 'answers'"),
        ({"remat": "blocks"}, "remat: unknown 'blocks'"),
        ({"kernels": "xal"}, "kernels: unknown 'xal'"),
        ({"dtype": "bf16"}, "dtype: unknown 'bf16'"),
        ({"stages": ()}, "stages: there is none"),
        (stage(steps=0), "stages.0.steps: must be at least 1"),
        (stage(block_size=0), "stages.0.block_size: must be between 1 and 15"),
        (stage(block_size=16), "stages.0.block_size: must be between 1 and 15"),
        (stage(density=0.0), "stages.0.density: must be above 0"),
        (stage(density=float("nan")), "stages.0.density: must be above 0"),
        (stage(clean_weight=-0.1), "stages.0.clean_weight: must be a number from 0, or 'auto'"),
        (stage(clean_weight=float("inf")), "stages.0.clean_weight: must be"),
        (stage(clean_weight="automatic"), "stages.0.clean_weight: must be"),
        (optimizer(learning_rate=0.0), "optimizer.learning_rate: must be above 0"),
        (optimizer(warmup=1.1), "optimizer.warmup: must be between 0 and 1"),
        (optimizer(final=-0.1), "optimizer.final: must be"),
        (optimizer(beta2=1.0), "optimizer.beta2: must be"),
        (optimizer(epsilon=0.0), "optimizer.epsilon: must be"),
        (optimizer(weight_decay=-1.0), "optimizer.weight_decay: must be"),
        (optimizer(clip=-1.0), "optimizer.clip: must be"),
        ({"length": 1}, "length: must be at least 2"),
        ({"batch_size": 8, "accumulation": 3}, "batch_size: 8 rows cannot be cut into 3 equal parts"),
        ({"accumulation": 0}, "accumulation: must be at least 1"),
        ({"seed": -1}, "seed: must be"),
        ({"divergence": 0.5}, "divergence: must be a factor above 1, or 0 for off"),
        ({"by_document": True}, "by_document: divides by the tokens of aligned groups, but stages.0.starts is random"),
        ({"mesh": MeshSettings(data=-1)}, "mesh: -1 takes the devices that are left, so at most one"),
        ({"mesh": MeshSettings(tp=0)}, "mesh.tp: must be at least 1, or -1"),
    ],
)
def test_values_that_make_no_sense_are_one_line(changes: dict[str, Any], message: str) -> None:
    refuses(replace(FULL, **changes), message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(FULL, mode="ar", **stage(noisy_loss="tv")), "stages.0.noisy_loss: does nothing in mode 'ar'"),
        (replace(FULL, mode="ar", **stage(clean_weight=1.0)), "stages.0.clean_weight: does nothing in mode 'ar'"),
        (replace(CONFIG, **stage(clean_weight="auto")), "stages.0.clean_weight: does nothing in mode 'gated-lora'"),
        (replace(CONFIG, noisy_targets="answer"), "noisy_targets: does nothing in mode 'gated-lora'"),
        (replace(FULL, adapter=AdapterSettings(rank=8)), "adapter: does nothing in mode 'full'"),
        (replace(CONFIG, adapter=AdapterSettings(rank=0)), "adapter.rank: must be at least 1"),
        (replace(CONFIG, adapter=AdapterSettings(alpha=0.0)), "adapter.alpha: must be above 0"),
        (replace(CONFIG, adapter=AdapterSettings(target_modules=())), "adapter.target_modules: there is none"),
        (
            replace(CONFIG, adapter=AdapterSettings(target_modules=("q_prj",))),
            "adapter.target_modules: unknown 'q_prj'",
        ),
        (replace(FULL, mode="ar"), None),
        (replace(FULL, noisy_targets="answer", **stage(noisy_loss="kl", clean_weight="auto")), None),
        (replace(FULL, by_document=True, **stage(starts="aligned")), None),
    ],
)
def test_settings_that_the_mode_has_no_use_for_are_refused(config: TrainConfig, message: str | None) -> None:
    refuses(config, message)


def refuses(config: TrainConfig, message: str | None) -> None:
    """``None``: it is fine."""
    if message is None:
        return validate(config)
    with pytest.raises(UserError) as caught:
        validate(config)
    assert str(caught.value).startswith(message)


def test_every_field_has_a_reader(tmp_path: Path) -> None:
    """A new field of a type that no reader knows must fail here, not at a user's."""
    plain = yaml.safe_load(to_yaml(FULL))
    assert plain.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(plain))
    assert load_train_config(tmp_path / "full.yaml") == FULL


@pytest.mark.parametrize(
    ("devices", "parts"), [(1, 8), (2, 8), (4, 8), (8, 4), (16, 2), (32, 1), (12, None), (64, None)]
)
def test_a_step_has_fewer_parts_where_a_part_would_not_have_a_row_for_every_device(devices: int, parts: int | None):
    assert fitting_parts(TrainConfig("", (), "", batch_size=32, accumulation=8), devices) == parts
