"""Peak memory of ``idlm convert`` and ``idlm export`` on synthetic checkpoints larger than they may hold in memory.

    python scripts/measure_convert_memory.py [--gigabytes 3] [--directory /tmp]

Makes two sharded bfloat16 Hugging Face checkpoints of random bits (one with a few huge tensors, one with many small
ones), converts each to Orbax and exports it back in processes of their own, compares every byte, and prints the peak
resident memory of each process beside the limit: three times the largest tensor plus 500 MB. Needs three times the
checkpoint's size on the disk; leaves nothing there. Exit code 1 when a limit is broken. Linux only. Run it when the
conversion code or the version of Orbax changes.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from idlm_jax.backbone.weights import layer_weights, parameter_count, weight_table
from idlm_jax.checkpoint import companions, safetensors
from idlm_jax.checkpoint.hf import INDEX_FILE, find_tensors, plan_shards
from idlm_jax.config import ModelConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {
    # 780 MB each for embedding and head, what a 4B model with Qwen3's vocabulary would have
    "few huge tensors": {"vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728},
    # 92 MB at most, and a limit near what the process needs for itself
    "many small tensors": {"vocab_size": 30_000, "hidden_size": 1536, "intermediate_size": 8960},
}


def synthetic_config(shape: dict[str, int], size: int) -> dict:
    """A Hugging Face config of the given widths with as many layers as fit into ``size`` bytes."""
    hf = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **shape,
    }
    config = ModelConfig.from_hf(hf)
    layer = sum(weight.size for weight in layer_weights(config, 0))
    hf["num_hidden_layers"] = 1 + max(0, size // 2 - parameter_count(config)) // layer
    return hf


def write_synthetic(directory: Path, hf: dict) -> int:
    """Write random bits in the shape of a model, in shards of 1 GB; returns the bytes of its largest tensor."""
    directory.mkdir()
    companions.write_json(directory / "config.json", hf)
    weights = weight_table(ModelConfig.from_hf(hf))
    layout = {weight.hf_name: (BFLOAT16, weight.hf_shape) for weight in weights}
    rng = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        shape = layout[name][1]
        return np.frombuffer(rng.bytes(2 * int(np.prod(shape))), BFLOAT16).reshape(shape)

    plan = plan_shards(layout, "1GB")
    for file, names in plan.filename_to_tensors.items():
        for _ in safetensors.write_file(directory / file, {name: layout[name] for name in names}, read):
            pass
    companions.write_json(directory / INDEX_FILE, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})
    return 2 * max(weight.size for weight in weights)


# The process reads its own peak: what the kernel tells a parent includes the parent's memory before exec.
_MEASURED_MAIN = """
import sys
from idlm_jax.cli.main import main
code = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def run(verb: str, source: Path, target: Path, limit: int) -> bool:
    """Run one verb in a process of its own and report its peak memory; returns whether it kept to the limit."""
    start = time.monotonic()
    command = [sys.executable, "-c", _MEASURED_MAIN, verb, str(source), str(target)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    peak = 1024 * int(output.split()[-1])
    kept = peak <= limit
    print(
        f"  idlm {verb:<8} peak {peak / 1e6:6.0f} MB, limit {limit / 1e6:6.0f} MB, "
        f"{time.monotonic() - start:5.1f} s  {'ok' if kept else 'TOO MUCH'}",
        flush=True,
    )
    return kept


def same_tensors(first: Path, second: Path) -> bool:
    """Whether two Hugging Face directories hold the same bytes under the same names."""
    ours, theirs = find_tensors(first), find_tensors(second)
    return ours.keys() == theirs.keys() and all(ours[name].equals(theirs[name]) for name in ours)


def main() -> int:
    """Measure both shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--directory", type=Path, default=None, help="where to work (default: the temporary directory)")
    options = parser.parse_args()
    kept = True
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
            work = Path(scratch)
            hf = synthetic_config(shape, int(options.gigabytes * 1e9))
            largest = write_synthetic(work / "hf", hf)
            total = 2 * parameter_count(ModelConfig.from_hf(hf))
            print(f"{name}: {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB", flush=True)
            limit = 3 * largest + 500_000_000
            kept &= run("convert", work / "hf", work / "orbax", limit)
            kept &= run("export", work / "orbax", work / "back", limit)
            if not same_tensors(work / "hf", work / "back"):
                print("  the round trip changed a tensor")
                kept = False
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
