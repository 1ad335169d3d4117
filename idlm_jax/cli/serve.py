"""``idlm serve``: answer the OpenAI HTTP API."""

import logging
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from idlm_jax.cli.flags import DecodeFlags, Model, ModelFlags, check_adapter, check_can_draft
from idlm_jax.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

# Cache is held for this many tokens of each request unless --max-length asks for more: a context may be far longer.
_DEFAULT_LENGTH = 4096


def serve(
    *,
    model: Model,
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, arg(metavar="PORT")] = 8000,
    api_key: Annotated[str | None, arg(metavar="KEY", help_behavior_hint="(default: everybody may ask)")] = None,
    name: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: from MODEL)")] = None,
    places: Annotated[int, arg(metavar="COUNT")] = 16,
    max_length: Annotated[
        int | None, arg(metavar="TOKENS", help_behavior_hint="(default: the model's context, at most 4096)")
    ] = None,
    cache_gb: Annotated[
        float | None, arg(metavar="GB", help_behavior_hint="(default: all places at full length, if there is room)")
    ] = None,
    adaptive: bool = True,
    max_logprobs: Annotated[int, arg(metavar="COUNT")] = 20,
    max_waiting: Annotated[int, arg(metavar="COUNT")] = 256,
    timeout: Annotated[float, arg(metavar="SECONDS")] = 600.0,
    log_prompts: bool = False,
    model_flags: Annotated[ModelFlags, arg(name="")],
    decode_flags: Annotated[DecodeFlags, arg(name="")],
) -> int:
    """Answer the OpenAI HTTP API, many requests at once, several tokens a forward pass.

    Any OpenAI client works: base URL http://HOST:PORT/v1. GET /ready tells when the programs are compiled, /metrics is
    for Prometheus. SIGTERM stops taking requests, answers those that are there, and ends; one JSON line a request goes
    to standard error.

    Examples:
      idlm serve --model models/SmolLM2-135M-Instruct.Q4_1.gguf --adapter smollm2-n4
      idlm serve --model checkpoints/i-dlm-8b --host 0.0.0.0 --api-key $KEY --places 64 --max-length 8192
      idlm chat --url http://127.0.0.1:8000

    Args:
        model: Hugging Face or Orbax directory, .gguf file, or Hugging Face Hub id (organisation/name).
        host: Address to listen on; 0.0.0.0 lets other machines in.
        port: Port to listen on; 0 takes a free one.
        api_key: What clients must send as bearer token.
        name: What clients call the model; with an adapter, NAME-ADAPTER gives the same text (with --ungated it is the
            only name).
        places: Texts decoded at once.
        max_length: Most tokens of a prompt and its text together.
        cache_gb: Memory for keys and values, in GB; texts share it, and where it is short they wait for each other.
        adaptive: Decode by the stride up to --stride, and the layout, that are fastest at the present load; AR is one
            of them. Otherwise always by --stride and --layout. The text is the same.
        max_logprobs: Likely tokens that a request can ask for in each place, with their log-probabilities; 0 refuses
            log-probabilities altogether.
        max_waiting: Texts that may wait for a place; beyond them requests get status 429.
        timeout: Longest time for an answer; after SIGTERM, too.
        log_prompts: Write prompts and answers into the log.
    """
    _require_packages()
    decode = decode_flags.config()
    _check(places, max_length, cache_gb, max_logprobs, max_waiting, timeout, port)
    loaded = model_flags.load(model)
    check_adapter(loaded, decode_flags)
    check_can_draft(model, loaded, decode)

    from idlm_jax.serving.api import Limits, Settings, create_app
    from idlm_jax.serving.engine import PagedEngine, pages_in
    from idlm_jax.serving.metrics import Metrics
    from idlm_jax.serving.service import Service
    from idlm_jax.serving.stride import candidates

    context = loaded.config.max_position_embeddings
    if max_length is not None and max_length > context:
        raise UserError(f"--max-length {max_length} exceeds the model's context of {context}")
    capacity = max_length or min(context, _DEFAULT_LENGTH)
    names = served_names(model, name, model_flags.adapter, decode.gated)
    policies = candidates(decode.policy()) if adaptive else [decode.policy()]
    pages = None if cache_gb is None else pages_in(loaded.model, cache_gb * 1e9)
    service = Service(
        loaded,
        decode.stride,
        lambda: PagedEngine(loaded.model, policies, places, capacity, pages, max_logprobs),
        max_waiting,
        Metrics(names[0]),
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    settings = Settings(names, api_key, Limits(answer_seconds=timeout), log_prompts)
    return _listen(create_app(service, settings), host, port, timeout)


def served_names(model: str, name: str | None, adapter: str | None, gated: bool) -> tuple[str, ...]:
    """The model's own name, and one with its adapter's; that one alone where the adapter changes the text."""
    base = name or Path(model).name.removesuffix(".gguf")
    if adapter is None:
        return (base,)
    adapted = f"{base}-{Path(adapter).name}"
    return (base, adapted) if gated else (adapted,)


def _listen(app: "FastAPI", host: str, port: int, timeout: float) -> int:
    import uvicorn

    from idlm_jax.serving.log import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("idlm_jax.serving").setLevel(logging.INFO)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(timeout)),
    )
    # uvicorn drains, then raises the signal again for whoever handled it before: that SIGTERM is what was asked for.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        listener = config.bind_socket()
        # uvicorn does so only once it runs, but whoever reads the line below may come at once.
        listener.listen(config.backlog)
    except (SystemExit, OSError):
        raise UserError(f"cannot listen on {host}:{port}") from None
    print(f"listening on http://{host}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _check(
    places: int,
    max_length: int | None,
    cache_gb: float | None,
    max_logprobs: int,
    max_waiting: int,
    timeout: float,
    port: int,
) -> None:
    for flag, value, least in (
        ("--places", places, 1),
        ("--max-length", max_length, 2),
        ("--cache-gb", cache_gb, 0),
        ("--max-logprobs", max_logprobs, 0),
        ("--max-waiting", max_waiting, 0),
        ("--timeout", timeout, 1),
        ("--port", port, 0),
    ):
        # Written so that it refuses nan.
        if value is not None and not least <= value < math.inf:
            raise UserError(f"{flag} must be at least {least}{' and finite' * (value == math.inf)}, not {value}")
    if port > 65535:
        raise UserError(f"--port must be at most 65535, not {port}")


def _require_packages() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'idlm-jax[serve]'") from None
