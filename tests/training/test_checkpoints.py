"""Checkpoints of a run: what comes back, what is kept, and what damage, full disks and kills do."""

import errno
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idlm_jax.checkpoint import atomic
from idlm_jax.errors import UserError
from idlm_jax.training.checkpoints import CHECKSUMS, Checkpoints
from idlm_jax.training.config import CheckpointSettings
from idlm_jax.training.step import TrainState
from tests.training.limits import files_limited_to

FINGERPRINT = {"mode": "full", "model": {"hidden_size": 8, "eos_token_ids": (1, 2)}}
SETTINGS = CheckpointSettings(keep_last=2, keep_best=1)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-3, 100)))


def make_state(value: float, size: int = 8) -> TrainState:
    params: dict[str, jax.Array] = {
        "embed_tokens.embedding": jnp.full((4, size), 1.0 * value),
        "layers.mlp.up": jnp.full((2, size, 4), -0.5),
    }
    return jax.device_put(TrainState(jnp.int32(value), params, OPTIMIZER.init(params)))


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def make_data() -> Any:
    return iter(grain.MapDataset.source(np.arange(1000)).seed(0).shuffle().repeat().to_iter_dataset().batch(4))


@contextmanager
def opened(output: Path, settings: CheckpointSettings = SETTINGS, **fingerprint: Any) -> Iterator[Checkpoints]:
    with Checkpoints(output, settings, {**FINGERPRINT, **fingerprint}) as checkpoints:
        yield checkpoints


def save_steps(output: Path, *steps: int, settings: CheckpointSettings = SETTINGS) -> None:
    with opened(output, settings) as checkpoints:
        data = make_data()
        for step in steps:
            next(data)
            checkpoints.save(step, make_state(step), data)


def restored(output: Path, **fingerprint: Any) -> tuple[int, TrainState] | None:
    with opened(output, **fingerprint) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)), make_data())


def same(state: TrainState, other: TrainState) -> bool:
    assert jax.tree.structure(state) == jax.tree.structure(other)
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), state, other)))


def test_state_and_data_come_back_as_they_were_when_save_was_called(tmp_path: Path) -> None:
    changed = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with opened(tmp_path) as checkpoints:
        state, data = make_state(3), make_data()
        next(data)
        checkpoints.save(7, state, data)
        # The run goes on at once, in the same buffers.
        for _ in range(3):
            state = changed(state)
        expected = next(data)
    data = make_data()
    with opened(tmp_path) as checkpoints:
        result = checkpoints.restore(abstract(make_state(0)), data)
    assert result is not None
    assert result[0] == 7 and same(result[1], make_state(3))
    assert np.array_equal(next(data), expected)


def test_nothing_to_restore_is_none(tmp_path: Path) -> None:
    assert restored(tmp_path) is None


def test_the_last_and_the_best_are_kept_also_over_a_restart(tmp_path: Path) -> None:
    metrics = {1: 0.5, 2: 0.9, 3: None, 4: 0.7, 5: None, 6: 0.1, 7: None}
    for part in ((1, 2, 3, 4), (5, 6, 7)):
        with opened(tmp_path) as checkpoints:
            for step in part:
                checkpoints.save(step, make_state(step), make_data(), metrics[step])
    with opened(tmp_path) as checkpoints:
        assert checkpoints.steps == [2, 6, 7]


def test_without_a_best_only_the_last_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path, CheckpointSettings(keep_last=1, keep_best=0)) as checkpoints:
        for step, metric in ((1, 0.9), (2, 0.5), (3, None)):
            checkpoints.save(step, make_state(step), make_data(), metric, wait=True)
            assert checkpoints.steps == [step]


def test_a_step_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(5, make_state(1), make_data())
        checkpoints.save(5, make_state(2), make_data(), wait=True)
    result = restored(tmp_path)
    assert result is not None and same(result[1], make_state(1))


def test_checksums_are_there_when_save_waited(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), make_data(), wait=True)
        sums = json.loads((checkpoints.directory / "1" / CHECKSUMS).read_text())
        files = {path for path in (checkpoints.directory / "1").rglob("*") if path.is_file()}
        assert len(sums) == len(files) - 1 > 5


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("which", "damage"),
    [
        ("largest", truncate),
        ("largest", flip),
        ("largest", Path.unlink),
        ("data", truncate),
        ("data", flip),
        # Missing checksums are no damage: the run was killed before they were written.
        ("checksums", truncate),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str, damage: Callable[[Path], None]
) -> None:
    save_steps(tmp_path, 1, 2)
    newest = tmp_path / "checkpoints" / "2"
    if which == "largest":
        damage(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    elif which == "data":
        (position,) = (path for path in newest.rglob("*") if path.is_file() and b'"next_index"' in path.read_bytes())
        damage(position)
    else:
        damage(newest / CHECKSUMS)
    result = restored(tmp_path)
    assert result is not None and result[0] == 1 and same(result[1], make_state(1))
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("checkpoint 2 is damaged (") and "damaged-2" in error
    # It is out of the way of the run, which comes to that step again.
    save_steps(tmp_path, 2)
    result = restored(tmp_path)
    assert result is not None and result[0] == 2


def test_all_damaged_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, 1, 2)
    for step in "12":
        (tmp_path / "checkpoints" / step / "_CHECKPOINT_METADATA").write_text("{")
    assert restored(tmp_path) is None
    assert capsys.readouterr().err.count("is damaged") == 2


# A load of Orbax that fails leaves a coroutine and a thread that outlives its event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
def test_one_without_checksums_is_used_if_it_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_steps(tmp_path, 1, 2, 3)
    for step in "23":
        (tmp_path / "checkpoints" / step / CHECKSUMS).unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "state" / "d")
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "state" / "ocdbt.process_0")
    result = restored(tmp_path)
    assert result is not None and result[0] == 2 and same(result[1], make_state(2))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("checkpoint 3 is damaged (")
    gc.collect()


@pytest.mark.parametrize(
    ("fingerprint", "message"),
    [
        ({"mode": "lora"}, "mode is full there, here lora"),
        ({"model": {"hidden_size": 16, "eos_token_ids": [1, 2]}}, "model.hidden_size is 8 there, here 16"),
        ({"adapter": None}, "adapter is not in it"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_stays(
    tmp_path: Path, fingerprint: dict[str, Any], message: str
) -> None:
    save_steps(tmp_path, 1)
    with pytest.raises(UserError) as caught:
        restored(tmp_path, **fingerprint)
    assert "another run: " + message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_weights_and_optimizers_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    with opened(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"params\.embed_tokens\.embedding is float32\[4, 8\] there, here float32"):
            checkpoints.restore(abstract(make_state(0, size=16)), make_data())
        state = make_state(0)
        other = TrainState(state.step, state.params, optax.sgd(0.1, momentum=0.9).init(state.params))
        with pytest.raises(UserError, match=r"optimizer\.0\.trace\.\S+ is not in it"):
            checkpoints.restore(abstract(other), make_data())


def test_a_save_that_fails_is_told_once_and_the_run_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    large = {"a": jnp.asarray(rng.normal(size=(400, 400)), jnp.float32)}
    small = {"a": jnp.zeros((400, 2))}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, small, make_data())
        checkpoints.save(2, small, make_data(), wait=True)
        with files_limited_to(200_000):
            checkpoints.save(3, large, make_data())
            checkpoints.wait()
        error = capfd.readouterr().err
        assert error.count("\n") == 1, error
        assert error.startswith("checkpoint 3 could not be saved (") and "the last one is of step 2" in error
        assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1", "2"]
        # What would have gone for the failed one is still known, and later saves work and tidy up.
        checkpoints.save(4, small, make_data(), wait=True)
        assert checkpoints.steps == [2, 4]
    assert capfd.readouterr().err == ""


def test_a_disk_without_room_is_noticed_before_anything_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), make_data(), wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(atomic.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10))
            checkpoints.save(2, make_state(2), make_data(), wait=True)
        assert checkpoints.steps == [1]
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("checkpoint 2 could not be saved (the disk is full); training goes on, the last one is")
        checkpoints.save(3, make_state(3), make_data(), wait=True)
        assert checkpoints.steps == [1, 3]


def test_checksums_that_cannot_be_written_leave_a_usable_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("idlm_jax.training.checkpoints.write_file", full)
        save_steps(tmp_path, 1)
    assert "checkpoint 1 is saved, but not its checksums" in capfd.readouterr().err
    result = restored(tmp_path)
    assert result is not None and result[0] == 1


SAVE_WITHOUT_END = """
    import sys
    from pathlib import Path
    from tests.training.test_checkpoints import make_data, make_state, opened

    with opened(Path(sys.argv[1])) as checkpoints:
        for step in range(1, 10_000):
            checkpoints.save(step, make_state(step), make_data())
            print(step, flush=True)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_during_a_save_leaves_one_that_works(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    process = start(SAVE_WITHOUT_END, str(tmp_path))
    assert process.stdout is not None
    begun = 0
    while begun < 4:
        begun = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    begun += sum(1 for line in process.communicate()[0].splitlines() if line)
    result = restored(tmp_path)
    assert result is not None
    step, state = result
    # Everything before the save that was cut off is there; that one may be.
    assert begun - 1 <= step <= begun + 1
    assert same(state, make_state(step))
    assert capfd.readouterr().err == ""
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


ACROSS_MESHES = """
    import sys
    from pathlib import Path

    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from tests.training.test_checkpoints import make_data, opened

    values = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)

    def sharding(shape, spec, devices=8):
        mesh = jax.make_mesh(shape, ("a", "b"), (AxisType.Explicit,) * 2, devices=jax.devices()[:devices])
        return NamedSharding(mesh, PartitionSpec(*spec))

    saved = sharding((8, 1), ("a", None))
    with opened(Path(sys.argv[1])) as checkpoints:
        checkpoints.save(1, {"w": jax.device_put(values, saved)}, make_data(), wait=True)
        others = [sharding((2, 4), ("b", "a")), sharding((4, 2), (None, ("a", "b"))), sharding((1, 1), (), 1)]
        others += [sharding((8, 1), ("b", "a"))]  # another layout on the same mesh
        for target in (saved, *others):
            abstract = {"w": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=target)}
            step, state = checkpoints.restore(abstract, make_data())
            assert state["w"].sharding == target, state["w"].sharding
            assert np.array_equal(np.asarray(state["w"]), values)
    print("fine")
"""


def test_a_checkpoint_restores_on_another_mesh_without_a_word(tmp_path: Path) -> None:
    process = start(ACROSS_MESHES, str(tmp_path))
    out, error = process.communicate(timeout=120)
    assert (out, error) == ("fine\n", "")


TWO_PROCESSES = """
    import sys
    from pathlib import Path

    import jax

    output, rank, port = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from tests.training.test_checkpoints import make_data, opened

    sharding = NamedSharding(jax.make_mesh((2,), ("a",)), PartitionSpec("a"))
    abstract = {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
    data = make_data()
    with opened(Path(output)) as checkpoints:
        for step in (1, 2):
            for _ in range(step):
                next(data)
            local = np.full(4, 10.0 * step + rank, np.float32)
            checkpoints.save(step, {"w": jax.make_array_from_process_local_data(sharding, local)}, data, wait=True)
        if rank == 0:
            (checkpoints.directory / "2" / "state" / "_METADATA").write_text("{")
        step, state = checkpoints.restore(abstract, data)
        position = data.get_state()["next_index"]
        print(step, float(state["w"].addressable_shards[0].data[0]), position, checkpoints.steps)
"""


def test_two_processes_save_and_restore_together(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [start(TWO_PROCESSES, str(tmp_path), str(rank), port) for rank in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [out.splitlines()[-1:] for out, _ in results] == [["1 10.0 4 [1]"], ["1 11.0 4 [1]"]], results
    # The damaged one is named by one of them.
    assert ["checkpoint 2 is damaged" in error for _, error in results] == [True, False]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create"):
        Checkpoints(tmp_path / "file", SETTINGS, FINGERPRINT)
