"""``idlm``: the console script. It imports the module of the chosen verb alone, and turns errors into an exit code."""

import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence

from idlm_jax.errors import UserError, did_you_mean

# Verb -> what `idlm --help` says of it. The module `idlm_jax.cli.<verb>` holds a function of the same name; a group of
# verbs (GROUPS) has none, but a module `<group>_<verb>` for each of its own.
VERBS = {
    "demo": "show exact parallel decoding on SmolLM2, side by side with ordinary decoding",
    "generate": "complete a prompt, several tokens a forward pass",
    "chat": "talk with a model in the terminal",
    "serve": "answer the OpenAI HTTP API, many requests at once",
    "convert": "turn a Hugging Face directory, Hub model or GGUF file into an Orbax checkpoint",
    "export": "turn any checkpoint into a Hugging Face directory",
    "info": "print configuration, parameters and memory of a checkpoint or configuration",
    "train": "teach a model, or an adapter beside it, to draft several tokens a forward pass",
    "data": "prepare, synthesize and inspect training data",
    "eval": "measure what a model or an adapter has learnt",
    "bench": "measure and predict how fast decoding is",
    "plan": "compile a step for devices that are not there: memory, traffic, least time",
    "fetch": "download the model of the demo",
}
GROUPS = {
    "data": {
        "prepare": "turn chats and text into a token store",
        "synthesize": "sample a token store from a model itself",
        "inspect": "show the rows of a token store as training sees them",
    },
    "eval": {
        "acceptance": "how often drafts would be accepted, and the tokens a forward that follow",
        "tasks": "scores of GSM8K, HumanEval and IFEval by AR and by strided decoding",
    },
    "bench": {
        "analyse": "tokens/s by stride, layout and batch, from acceptance and step times",
        "serve": "load on a running server: tokens/s and times by the number of clients",
    },
    "plan": {
        "train": "a training step on GPUs or a slice of TPUs",
        "decode": "a round of decoding on GPUs or a slice of TPUs",
    },
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
    return (
        "usage: idlm VERB [options]\n\n"
        "Introspective diffusion language models in JAX: convert, inspect and decode checkpoints.\n\n"
        f"{_list_verbs(VERBS)}\n{_EXAMPLES}"
    )


def group_help_text(group: str) -> str:
    """What ``idlm GROUP --help`` prints."""
    verbs = _list_verbs(GROUPS[group])
    return (
        f"usage: idlm {group} VERB [options]\n\n{VERBS[group].capitalize()}.\n\n{verbs}\nidlm {group} <verb> --help\n"
    )


def _list_verbs(verbs: Mapping[str, str]) -> str:
    width = max(map(len, verbs))
    return "verbs:\n" + "".join(f"  {verb:<{width}}  {text}\n" for verb, text in verbs.items())


def _run(arguments: list[str], group: str = "") -> int:
    """Run the verb that the arguments begin with: one of idlm's own, or of a group."""
    verbs, text = (GROUPS[group], group_help_text(group)) if group else (VERBS, help_text())
    if not arguments:
        print(text, file=sys.stderr, end="")
        return 2
    verb, *rest = arguments
    if verb in ("-h", "--help", "help"):
        print(text, end="")
        return 0
    if not group and verb in ("-V", "--version", "version"):
        return _print_version()
    words = f"{group} {verb}".lstrip()
    if verb not in verbs:
        program = f"idlm {group}".rstrip()
        raise UserError(f"unknown verb '{words}'{did_you_mean(verb, verbs)} ({program} --help lists them)")
    if not group and verb in GROUPS:
        return _run(rest, verb)
    return _call(words, rest)


def _print_version() -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"idlm {version('idlm_jax')}")
    except PackageNotFoundError:
        print("idlm (not installed; running from its source)")
    return 0


def _call(words: str, arguments: list[str]) -> int:
    import tyro

    name = words.replace(" ", "_")
    function = getattr(importlib.import_module(f"idlm_jax.cli.{name}"), name)
    # The docstring as it stands, up to the arguments: tyro by itself would drop the examples.
    description = inspect.cleandoc(function.__doc__ or "").split("\nArgs:")[0].strip()
    code = tyro.cli(
        function, prog=f"idlm {words}", description=description, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
    )
    sys.stdout.flush()  # a closed pipe shows here rather than at exit
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
