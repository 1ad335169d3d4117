"""Write the golden fixtures of the tests: tiny checkpoints and what PyTorch computes from them.

Run it by hand where torch and transformers 5 are installed (CPU is enough),
when a family, RoPE type or file format is added; commit what it writes. The tests read the files and need no torch.

    python scripts/make_golden.py --out tests/golden

On one machine the bytes are the same at every run; another CPU or torch may differ in the last digits of the logits.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on the network

import torch
import transformers
from golden.hf_cases import write_hf_cases


def main() -> None:
    """Parse the arguments and write the fixtures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the fixtures, e.g. tests/golden")
    args = parser.parse_args()

    torch.set_num_threads(1)  # one order of summation
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    write_hf_cases(args.out)


if __name__ == "__main__":
    main()
