"""Tokens/s of our server by the number of clients, AR beside ISD, over the same weights on one device.

Run on an accelerator, by hand::

    python scripts/bench_serve.py --simulated-acceptance .9 --output runs/serve
    python scripts/bench_serve.py --model MODEL.gguf --adapter smollm2-n4 --concurrency 1 8 64 256 --output runs/smollm2

The server is that of ``idlm serve``, in this process; the clients are ``idlm bench serve``, in a process of their own.
AR alone, then ISD, in the same engine: by the strides and layouts up to ``--stride`` that are fastest at each load, AR
among them; with ``--fixed`` also by ``--stride`` and ``--layout`` alone, in an engine of its own. The table says which
share of the rounds each way of decoding had. Without ``--model`` weights are random, in the shape of ``--config``, with
a word-level tokenizer of the same vocabulary, and prompts are random tokens. ``--trace 1 64`` also looks at the device
under so many clients, last of all: the time without a kernel, which is what the host does not hide, and how much of it
is in gaps longer than those between the kernels of one program.

Random weights accept no draft. ``--simulated-acceptance P`` replaces, in this process alone, how many drafts are
accepted by a draw from the request's seed: each with chance P if those before it were, none in a cold round. Forward
passes, verification and drafting run as ever, but the text means nothing. A model of ``--model`` is never simulated;
its prompts are chats, those of IFEval unless ``--prompts`` names others.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import tyro
import uvicorn
from bench_decode_step import make_model
from device_idle import HOST_GAP, idle_shares, read_trace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from idlm_jax import LanguageModel, UserError, load
from idlm_jax.config import ModelConfig, load_yaml
from idlm_jax.decoding import step
from idlm_jax.decoding.config import DecodeConfig
from idlm_jax.decoding.sampling import PURPOSE_ACCEPT, PURPOSE_DRAFT, PURPOSE_TOKEN, Drafts, Filters
from idlm_jax.decoding.step import Policy
from idlm_jax.evaluation.reports import Grid, markdown, write_files
from idlm_jax.evaluation.tasks import ifeval
from idlm_jax.serving.api import Limits, Settings, create_app
from idlm_jax.serving.engine import PagedEngine
from idlm_jax.serving.metrics import Metrics
from idlm_jax.serving.service import Service
from idlm_jax.serving.stride import StrideChooser, candidates
from pallas_kernels.verify.reference import leading, row_keys

_CHATS = Path(ifeval.__file__).with_name("ifeval_prompts.jsonl")
# For the noise of simulated acceptance; no other draw has this number.
_PURPOSE_SIMULATED = 1 + max(PURPOSE_ACCEPT, PURPOSE_DRAFT, PURPOSE_TOKEN)
_SECONDS = 3600.0
# Most tokens of each request while the device is traced, and the part of the trace that counts: in it all are served.
# Up to half of a trace is of the lone request by which the clients see whether the server answers; then come prefills.
_TRACED_TOKENS, _FULL_LOAD = 256, (0.6, 0.85)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    # Shape of a model with random weights: a YAML file with Hugging Face keys.
    config: Path = Path("configs/models/qwen3-8b.yaml")
    # A real model instead, and its adapter.
    model: str | None = None
    adapter: str | None = None
    # Of the random weights; a real model's is its own.
    dtype: str = "bfloat16"
    # Rank of a gated LoRA with random weights; 0 is none.
    adapter_rank: int = 0
    # Chance that a draft is accepted; for random weights alone.
    simulated_acceptance: float | None = None
    # Of ISD, at most.
    stride: int = 4
    # Measure that stride with this layout alone, too.
    fixed: bool = False
    layout: Literal["branch", "standard"] = "standard"
    concurrency: tuple[int, ...] = (1, 8, 32, 64, 128)
    # Of these, trace the device, too: the share of a second in which it waits for the host.
    trace: tuple[int, ...] = ()
    # Of every level; two a client, and at least 8, if not given.
    requests: int | None = None
    # Of random prompts.
    prompt_tokens: int = 128
    output_tokens: int = 512
    # Chats for a real model.
    prompts: Path = _CHATS
    # Most tokens of such a chat.
    longest_chat: int = 256
    temperature: float = 0.0
    seed: int = 0
    # Directory for serve.json and serve.md.
    output: Path | None = None

    @property
    def capacity(self) -> int:
        """Most tokens of a request."""
        return (self.prompt_tokens if self.model is None else self.longest_chat) + self.output_tokens

    @property
    def what(self) -> str:
        """How drafts come to be accepted, for every line of output."""
        rate = self.simulated_acceptance
        return "real acceptance" if rate is None else f"acceptance SIMULATED at {rate:g} a draft"


def make_language_model(options: Options) -> LanguageModel:
    """The real model, or one with random weights and words without meaning."""
    if options.model is not None:
        return load(options.model, options.adapter)
    config = ModelConfig.from_hf(load_yaml(options.config), str(options.config))
    if config.mask_token_id is None:
        config = config.replace(mask_token_id=config.vocab_size - 1)
    model = make_model(config, jnp.dtype(options.dtype), options.adapter_rank)
    return LanguageModel(model, make_tokenizer(config.vocab_size), options.adapter_rank > 0)


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A word a token, and decoded from bytes as Qwen3's are, so that text costs what it costs there."""
    tokenizer = Tokenizer(models.WordLevel({f"Ġw{i}": i for i in range(size)}, unk_token="Ġw0"))
    tokenizer.pre_tokenizer = cast("Any", pre_tokenizers.ByteLevel(add_prefix_space=True))
    tokenizer.decoder = cast("Any", decoders.ByteLevel())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def simulate_acceptance(rate: float) -> None:
    """Let the rounds of this process accept drafts at random; the real verification still gives the next token."""
    real = step.verify

    def verify(
        logits: jax.Array,
        filters: Filters,
        coupling: Any,
        drafts: Drafts,
        warm: jax.Array,
        positions: jax.Array,
        *more: Any,
        **how: Any,
    ) -> tuple[jax.Array, jax.Array]:
        accepted, token = real(logits, filters, coupling, drafts, warm, positions, *more, **how)
        if positions.shape[1] == 1:
            return accepted, token
        keys = row_keys(filters.key, positions[:, :-1], _PURPOSE_SIMULATED)
        return leading(jax.vmap(jax.vmap(jax.random.uniform))(keys) < rate, warm), token

    step.verify = verify


@contextmanager
def serving(
    model: LanguageModel, policies: Sequence[Policy], name: str, options: Options
) -> Iterator[tuple[str, Service, StrideChooser]]:
    """A server of the model on a free port of this machine, once it is ready: its address, and what runs behind it."""
    engine = PagedEngine(model.model, policies, max(options.concurrency), options.capacity)
    service = Service(
        model,
        max(policy.stride for policy in policies),
        lambda: engine,
        max(options.concurrency),
        Metrics(name),
        say=lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True),
    )
    app = create_app(service, Settings((name,), limits=Limits(answer_seconds=_SECONDS)))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False)
    listener = config.bind_socket()
    listener.listen(config.backlog)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while service.state == "starting" and thread.is_alive():
            time.sleep(0.05)
        if service.state != "ready":
            raise UserError(f"{name}: the engine is {service.state}; the log above says why")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service, engine.strides
    finally:
        server.should_exit = True
        thread.join()


def clients(url: str, vocabulary: int, levels: tuple[int, ...], options: Options) -> "subprocess.Popen[str]":
    """``idlm bench serve`` in a process of its own."""
    asked = ["--output-tokens", options.output_tokens, "--temperature", options.temperature, "--seed", options.seed]
    if options.model is None:
        asked += ["--prompt-tokens", options.prompt_tokens, "--token-ids", 0, vocabulary]
    else:
        asked += ["--prompts", options.prompts]
    if options.requests is not None:
        asked += ["--requests", options.requests]
    asked += ["--json", "--concurrency", *levels]
    command = [sys.executable, "-m", "idlm_jax.cli.main", "bench", "serve", "--url", url, *map(str, asked)]
    # The accelerator is the server's.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def measure(url: str, service: Service, name: str, vocabulary: int, options: Options) -> Iterator[dict[str, Any]]:
    """What the clients say of every level, and how many rounds the engine ran by which policy."""
    before = rounds_by_policy(service)
    with clients(url, vocabulary, options.concurrency, options) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = rounds_by_policy(service)
            rounds = {policy: count - before.get(policy, 0) for policy, count in now.items()}
            before = now
            named = {"way": name, "simulated_acceptance": options.simulated_acceptance}
            yield {**named, "rounds": {policy: count for policy, count in rounds.items() if count}, **json.loads(line)}
    if process.returncode:
        raise UserError(f"{name}: the clients ended with exit code {process.returncode}")


def idle(url: str, service: Service, vocabulary: int, level: int, options: Options) -> tuple[float, float] | None:
    """Shares of the time under full load in which the device waits (``idle_shares``); None where it has no trace.

    The profiler is started and stopped while the device rests: it breaks kernels that are under way. It also slows the
    host down a little, so this load is one more, and not among those that are measured. It must not look at the host:
    Python gets several times as slow by it.
    """
    of_device = jax.profiler.ProfileOptions()
    of_device.python_tracer_level = of_device.host_tracer_level = 0
    one_each = dataclasses.replace(options, requests=level, output_tokens=min(options.output_tokens, _TRACED_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        with (
            jax.profiler.trace(folder, create_perfetto_trace=True, profiler_options=of_device),
            clients(url, vocabulary, (level,), one_each) as process,
        ):
            while process.poll() is None and _running(service) < level:
                time.sleep(0.01)
            full = process.poll() is None
            process.communicate()
        return idle_shares(read_trace(Path(folder)), _FULL_LOAD) if full else None


def rounds_by_policy(service: Service) -> dict[str, int]:
    """Rounds since the start."""
    found = re.findall(r'idlm:rounds_total{.*?policy="(.*?)"} (\S+)', service.metrics.render().decode())
    return {policy: int(float(count)) for policy, count in found}


def _running(service: Service) -> float:
    found = re.search(rb"vllm:num_requests_running{.*?} (\S+)", service.metrics.render())
    assert found is not None
    return float(found[1])


def table(levels: list[dict[str, Any]], options: Options, title: str) -> Grid:
    """Every way at every number of clients; each line says how drafts were accepted."""
    ar = {level["concurrency"]: level for level in levels if level["way"] == "AR"}
    header = (
        "clients",
        "",
        "rounds by",
        "tok/s, steady",
        "whole",
        "AR = 1",
        "of a request",
        "TPF",
        "TTFT p50 / p99, ms",
    )
    rows = []
    for level in sorted(levels, key=lambda level: level["concurrency"]):
        steady, first, each = level["steady_tokens_per_second"], level["TTFT"], level["TPOT"]
        failed, waits = sum(level["errors"].values()), level.get("idle")
        rounds = sum(level["rounds"].values())
        rows.append(
            (
                str(level["concurrency"]),
                level["way"] + (f", {failed} FAILED" if failed else ""),
                ", ".join(f"{policy} {count / rounds:.0%}" for policy, count in level["rounds"].items()),
                "-" if steady is None else f"{steady:,.0f}",
                f"{level['tokens_per_second']:,.0f}",
                f"{level['tokens_per_second'] / ar[level['concurrency']]['tokens_per_second']:.2f}",
                f"{level['tokens_per_second_per_request']:,.0f}",
                f"{level['tokens_per_forward']:.2f}",
                f"{1e3 * first['p50']:,.0f} / {1e3 * first['p99']:,.0f}",
                f"{1e3 * each['p50']:.2f} / {1e3 * each['p99']:.2f}",
                "-" if waits is None else f"{waits[0]:.1%} ({waits[1]:.1%})",
                options.what,
            )
        )
    return Grid(
        title, (*header, "TPOT p50 / p99, ms", f"device idle (in gaps ≥ {HOST_GAP:g} µs)", "drafts"), tuple(rows)
    )


def main(options: Options) -> None:
    """Measure one way after the other, and print a table."""
    rate = options.simulated_acceptance
    if rate is not None:
        if options.model is not None:
            raise UserError("--simulated-acceptance is for random weights; a real model accepts what it accepts")
        if not 0 <= rate <= 1:
            raise UserError(f"--simulated-acceptance must be in 0 … 1, not {rate}")
        simulate_acceptance(rate)
    if missing := set(options.trace) - set(options.concurrency):
        raise UserError(f"--trace {min(missing)} is none of the numbers of clients")
    model = make_language_model(options)
    isd = DecodeConfig(stride=options.stride, layout=options.layout)
    all_ways = candidates(isd.policy())
    # Of an engine, its policies, and those that each way may use.
    engines = [(all_ways, {"AR": all_ways[:1], f"ISD N≤{isd.stride}": all_ways})]
    if options.fixed:
        engines.append(([isd.policy()], {f"ISD N={isd.stride} {isd.layout}": [isd.policy()]}))
    levels: list[dict[str, Any]] = []
    text = ""
    for policies, ways in engines:
        with serving(model, policies, next(iter(ways)), options) as (url, service, strides):
            for name, strides.allowed in ways.items():
                for level in measure(url, service, name, model.config.vocab_size, options):
                    levels.append(level)
                    print(f"{options.what}: {json.dumps(level)}", file=sys.stderr, flush=True)
                text = report(levels, model, options)
            # When all else has been measured: the profiler can fail.
            for name, strides.allowed in ways.items():
                for level in levels:
                    if level["way"] == name and level["concurrency"] in options.trace:
                        level["idle"] = idle(url, service, model.config.vocab_size, level["concurrency"], options)
            text = report(levels, model, options)
    print(text)


def report(levels: list[dict[str, Any]], model: LanguageModel, options: Options) -> str:
    """What has been measured so far, as text, and in files if asked."""
    device = jax.devices()[0].device_kind
    shape = options.config.stem if options.model is None else Path(options.model).name
    prompts = f"{options.prompt_tokens} random tokens" if options.model is None else f"chats of {options.prompts.name}"
    title = (
        f"{shape}, {model.model.dtype}, {device}, jax {jax.__version__}, prompts of {prompts}, texts of "
        f"{options.output_tokens} tokens, temperature {options.temperature:g}, {options.what}"
    )
    text = markdown([table(levels, options, title)])
    if options.output is not None:
        everything = {"title": title, "command": sys.argv, "levels": levels}
        write_files(options.output, {"serve.json": json.dumps(everything, indent=2) + "\n", "serve.md": text})
    return text


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
