"""Write the golden fixtures of the tests: tiny checkpoints and what PyTorch computes from them.

Run it by hand where torch and transformers 5 are installed (CPU is enough; peft, gguf and tokenizers for those parts),
when a family, RoPE type or file format is added; commit what it writes. The tests read the files and need no torch.

    python scripts/make_golden.py --out tests/golden                        # everything below but the real model
    python scripts/make_golden.py --out tests/golden --only hf              # one part, in this order:
                                                                            # hf, peft, gguf, training, equivalence
    python scripts/make_golden.py --out tests/golden --smollm2 PATH.gguf    # only the real SmolLM2-135M-Instruct

On one machine the bytes are the same at every run; another CPU or torch may differ in the last digits of the logits.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on the network

import torch
import transformers

PARTS = ("hf", "peft", "gguf", "training", "equivalence")
sys.path.append(str(Path(__file__).parents[1]))  # tests/reference


def main() -> None:
    """Parse the arguments and write the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the fixtures, e.g. tests/golden")
    parser.add_argument("--only", choices=PARTS, help="write this part only")
    parser.add_argument("--smollm2", type=Path, metavar="PATH.gguf", help="write only the part of the real model")
    args = parser.parse_args()

    torch.set_num_threads(1)  # one order of summation
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.smollm2:
        torch.set_num_threads(os.cpu_count() or 1)  # a real model: the margins are stored beside the tokens
        from golden.smollm2 import write_smollm2

        write_smollm2(args.smollm2, args.out)
        return
    for part in [args.only] if args.only else PARTS:
        print(f"writing {part}", flush=True)
        write_part(part, args.out)


def write_part(part: str, out: Path) -> None:
    """Import a part only when it is asked for: each needs its own libraries."""
    if part == "hf":
        from golden.hf_cases import write_hf_cases as write
    elif part == "peft":
        from golden.peft_cases import write_peft_cases as write
    elif part == "gguf":
        from golden.gguf_cases import write_gguf_cases as write
    elif part == "training":
        from golden.training import write_training_cases as write
    else:
        from golden.equivalence import write_equivalence as write
    write(out)


if __name__ == "__main__":
    main()
