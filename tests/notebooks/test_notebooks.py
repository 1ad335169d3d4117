"""The notebooks: every pair of .py and .ipynb is in step, its links lead somewhere, and its code runs at tiny size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))

# A tiny model with an adapter plays SmolLM2, already fetched into the working directory.
TINY_SMOLLM2 = """
import dataclasses, hashlib, shutil
from pathlib import Path
import jax
import jax.numpy as jnp
from idlm_jax.backbone.adapter import AdapterConfig, init_adapter
from idlm_jax.checkpoint import fetch, shipped
from idlm_jax.checkpoint.open import open_source
from idlm_jax.checkpoint.peft import save_adapter

tiny = Path({model!r})
Path("models").mkdir()
known, digest = fetch.MODELS["smollm2"], hashlib.sha256(tiny.read_bytes()).hexdigest()
shutil.copy(tiny, Path("models") / known.file_name)
fetch.MODELS["smollm2"] = dataclasses.replace(known, sha256=digest, mask_token_id=0)
settings = AdapterConfig(rank=2, alpha=4, target_modules=("q_proj",), mask_token_id=0)
shipped.ADAPTERS = Path("adapters")
adapter = init_adapter(open_source(tiny).config, settings, jax.random.key(0), jnp.float32)
save_adapter(adapter, shipped.ADAPTERS / "smollm2_n4")
"""
# What runs before a notebook, what takes the place of its parameters, and what it must print.
TINY = {
    "1_quick_start": (TINY_SMOLLM2, "PROMPT, MAX_TOKENS = '12', 20", r"same tokens as AR +- +yes +yes"),
    "2_train_adapter": (
        TINY_SMOLLM2,
        "TOPICS, SAMPLES_PER_TOPIC, STEPS, TEST_PROMPT = ('1', '2'), 8, 4, '12'",
        r"4 steps, adapter in runs/notebook/adapter[\s\S]*same tokens as AR +- +yes",
    ),
    "3_sharding": ("", "SIMULATED, STEPS = 4, 3", r"fsdp 2 × tp 2[\s\S]* all-gather"),
    "4_exactness": (
        "",
        "SAMPLES, STRIDES = 8192, (3,)",
        r"ISD, gumbel .*: within[\s\S]*ISD, ratio .*: within[\s\S]*official rule .*: not the same"
        r"[\s\S]*branch  : 4096 of 4096",
    ),
}


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem)
def script(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_every_notebook_is_run() -> None:
    assert [path.stem for path in SCRIPTS] == sorted(TINY)


def test_a_pair_holds_the_same_cells(script: Path) -> None:
    source, notebook = (jupytext.read(script.with_suffix(suffix)) for suffix in (".py", ".ipynb"))
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (source, notebook)]
    assert cells[0] == cells[1], f"after an edit: jupytext --to ipynb --update notebooks/{script.name}"


def test_links_lead_to_files_of_the_project(script: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", script.read_text().replace("\n# ", " "))
    assert links
    for link in links:
        assert (script.parent / link).exists(), link


@pytest.mark.parametrize("name", sorted(TINY))
def test_code_runs_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    before, parameters, printed = TINY[name]
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    parts = [before.format(model=str(ROOT / "tests" / "golden" / "gguf" / "qwen3_f32.gguf"))]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            parts.append("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", ()):
                parts.append(parameters)
    assert parameters in parts
    # A file, so that an error names its line.
    program = tmp_path / f"{name}.py"
    program.write_text("\n\n".join(parts), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "agg",
        "COLUMNS": "140",
        # Compiling is nearly all that takes time.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(program)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.search(printed, done.stdout), done.stdout
    assert "Warning" not in done.stderr, done.stderr
