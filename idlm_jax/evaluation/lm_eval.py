"""``python -m idlm_jax.evaluation.lm_eval``: the command line of lm-evaluation-harness, which then knows our models.

    python -m idlm_jax.evaluation.lm_eval --model idlm --model_args pretrained=models/smollm2,adapter=smollm2-n4 \
        --tasks gsm8k --apply_chat_template
"""

import importlib
import multiprocessing
import sys

from idlm_jax.errors import UserError


def main() -> int:
    """Run lm_eval; returns the exit code (0 done, 2 bad input)."""
    try:
        importlib.import_module("idlm_jax.evaluation.harness")
    except ModuleNotFoundError as error:
        print(f"idlm: error: this needs {error.name}: pip install 'idlm-jax[eval]'", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    # It computes errors of perplexities in processes of its own; a fork of one that runs JAX may hang.
    multiprocessing.set_start_method("forkserver")
    try:
        cli_evaluate()
    except UserError as error:
        print(f"idlm: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
