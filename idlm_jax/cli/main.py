"""``idlm``: the console script. It imports the module of the chosen verb alone, and turns errors into an exit code."""

import importlib
import inspect
import os
import sys
from collections.abc import Sequence

from idlm_jax.errors import UserError, did_you_mean

# Verb -> what `idlm --help` says of it. The module `idlm_jax.cli.<verb>` holds a function of the same name.
VERBS = {
    "demo": "show exact parallel decoding on SmolLM2, side by side with ordinary decoding",
    "generate": "complete a prompt, several tokens a forward pass",
    "chat": "talk with a model in the terminal",
    "convert": "turn a Hugging Face directory, Hub model or GGUF file into an Orbax checkpoint",
    "export": "turn any checkpoint into a Hugging Face directory",
    "info": "print configuration, parameters and memory of a checkpoint or configuration",
    "fetch": "download the model of the demo",
}

_EXAMPLES = """\
examples:
  idlm demo
  idlm convert Qwen/Qwen3-0.6B checkpoints/qwen3-0.6b --dtype bfloat16
  idlm info checkpoints/qwen3-0.6b --length 32768
  idlm generate checkpoints/qwen3-0.6b --prompt "Why is the sky blue?"
  idlm <verb> --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code (0 done, 1 a check failed, 2 bad input, 130 interrupted)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except UserError as error:
        print(f"idlm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("idlm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; keep Python from complaining when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def help_text() -> str:
    """What ``idlm --help`` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: idlm VERB [options]\n\n"
        "Introspective diffusion language models in JAX: convert, inspect and decode checkpoints.\n\n"
        f"verbs:\n{verbs}\n\n{_EXAMPLES}"
    )


def _run(arguments: list[str]) -> int:
    if not arguments:
        print(help_text(), file=sys.stderr, end="")
        return 2
    verb, *rest = arguments
    if verb in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if verb in ("-V", "--version", "version"):
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"idlm {version('idlm_jax')}")
        except PackageNotFoundError:
            print("idlm (not installed; running from its source)")
        return 0
    if verb not in VERBS:
        raise UserError(f"unknown verb '{verb}'{did_you_mean(verb, VERBS)} (idlm --help lists them)")

    import tyro

    function = getattr(importlib.import_module(f"idlm_jax.cli.{verb}"), verb)
    # The docstring as it stands, up to the arguments: tyro by itself would drop the examples.
    description = inspect.cleandoc(function.__doc__ or "").split("\nArgs:")[0].strip()
    code = tyro.cli(
        function, prog=f"idlm {verb}", description=description, args=rest, config=(tyro.conf.FlagCreatePairsOff,)
    )
    sys.stdout.flush()  # a closed pipe shows here rather than at exit
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
