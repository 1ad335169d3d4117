"""``idlm bench serve``: load on a running server, and how fast it answers."""

import json as jsonlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.markup import escape
from tyro.conf import arg

from idlm_jax.cli.progress import Progress
from idlm_jax.cli.render import Notice, make_console, printable, show_grids
from idlm_jax.errors import UserError
from idlm_jax.serving.client import Client

if TYPE_CHECKING:
    from idlm_jax.evaluation.load import Level, Workload

_CLIENTS = (1, 8, 32, 64)
_FEWEST_REQUESTS = 8
_PROMPT_TOKENS = 128


def bench_serve(
    *,
    url: Annotated[str, arg(metavar="URL", aliases=["--base-url"])] = "http://127.0.0.1:8000",
    concurrency: Annotated[
        tuple[int, ...],
        arg(
            metavar="C1 C2 …",
            aliases=["--max-concurrency"],
            help_behavior_hint="(default: 1 8 32 64; no limit with --rate)",
        ),
    ] = (),
    rate: Annotated[
        float | None,
        arg(metavar="REQUESTS/S", aliases=["--request-rate"], help_behavior_hint="(default: as fast as answers come)"),
    ] = None,
    requests: Annotated[
        int | None,
        arg(metavar="COUNT", aliases=["--num-prompts"], help_behavior_hint="(default: 2 a client, at least 8)"),
    ] = None,
    prompt_tokens: Annotated[
        int | None, arg(metavar="COUNT", aliases=["--random-input-len"], help_behavior_hint="(default: 128)")
    ] = None,
    output_tokens: Annotated[int, arg(metavar="COUNT", aliases=["--random-output-len"])] = 128,
    token_ids: Annotated[tuple[int, int], arg(metavar="LOW END")] = (100, 1000),
    prompts: Annotated[Path | None, arg(metavar="FILE.jsonl", help_behavior_hint="(default: random tokens)")] = None,
    model: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the server's first)")] = None,
    api_key: Annotated[str | None, arg(metavar="KEY", help_behavior_hint="(default: none)")] = None,
    temperature: Annotated[float, arg(metavar="T")] = 0.0,
    seed: Annotated[int, arg(metavar="SEED")] = 0,
    output: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: none)")] = None,
    json: bool = False,
) -> None:
    """Put load on a running server of the OpenAI API, idlm's or another, and tell how fast it answers.

    Every level of --concurrency is a measurement of its own: so many clients, each with its next request as soon as it
    has an answer; as many --requests as clients are one burst. With --rate requests come at random times (Poisson).
    Texts are streamed, and have the length that was asked for (ignore_eos). TTFT is the time to the first text, TPOT
    the time per token after it; tokens are the server's count. One request goes ahead, unmeasured.

    Examples:
      idlm bench serve --concurrency 1 8 32 64 --prompt-tokens 128 --output-tokens 512
      idlm bench serve --url http://127.0.0.1:8000 --rate 4 --requests 200 --prompts chats.jsonl --output runs/load

    Args:
        url: The server.
        concurrency: Most requests at once; several are measured one after the other.
        rate: Requests a second, at random times; times count from when a request is sent.
        requests: Requests of every level.
        prompt_tokens: Tokens of a prompt; they are random.
        output_tokens: Tokens of a text.
        token_ids: Random prompts are of token ids from LOW to END - 1, which the model's vocabulary must hold.
        prompts: Chats instead, each up to its last user message, in turn ({"messages": …}, or {"prompt": …} a line).
        model: One of the server's names.
        api_key: What the server asks for.
        temperature: 0 is greedy.
        seed: Of prompts, of texts (every request has its own) and of the times of requests.
        output: Directory for load.json, which has every request, and load.png.
        json: Print a JSON line a level.
    """
    clients = concurrency or (() if rate is not None else _CLIENTS)
    if prompts is not None and prompt_tokens is not None:
        raise UserError("give either --prompts, or --prompt-tokens of random ones")
    prompt_tokens = _PROMPT_TOKENS if prompt_tokens is None else prompt_tokens
    _check(clients, rate, requests, prompt_tokens, output_tokens, token_ids, temperature, seed)
    with Notice(f"asking {url}"):
        from idlm_jax.evaluation.load import Workload, try_out

        client = Client(url, api_key)
        name = client.model(model)
        if output is not None:
            from idlm_jax.plots import require_matplotlib

            require_matplotlib()
        chats = _chats(prompts)
        workload = Workload(name, output_tokens, prompt_tokens, token_ids, chats, temperature, seed)
        try_out(client, workload)
    levels = _measure(client, workload, clients or (None,), rate, requests, json)
    from idlm_jax.evaluation.load_report import grids, remarks, write_report

    what = f"{len(chats)} chats" if chats else f"{prompt_tokens} random tokens"
    title = f"{name} at {client.url}: prompts of {what}, texts of {output_tokens} tokens, temperature {temperature:g}"
    if output is not None:
        write_report(title, levels, output)
    if not json:
        console = make_console()
        console.print(f"[bold]{escape(printable(title))}[/]", soft_wrap=True)
        console.print("\n".join(remarks(levels)), soft_wrap=True)
        show_grids(console, grids(levels))


def _measure(
    client: Client,
    workload: "Workload",
    clients: tuple[int | None, ...],
    rate: float | None,
    requests: int | None,
    json: bool,
) -> list["Level"]:
    from idlm_jax.evaluation.load import measure
    from idlm_jax.evaluation.load_report import as_dict

    levels = []
    for most in clients:
        count = requests or max(2 * (most or 0), _FEWEST_REQUESTS)
        label = f"{rate:g} requests/s" if rate is not None else f"concurrency {most}"
        with Progress(label, count, "requests") as progress:
            levels.append(measure(client, workload, count, most, rate, lambda: progress(1)))
        if json:
            print(jsonlib.dumps(as_dict(levels[-1])), flush=True)
    return levels


def _chats(path: Path | None) -> list[list[dict[str, str]]]:
    if path is None:
        return []
    from idlm_jax.data.chat import read_prompts

    return read_prompts(path)


def _check(
    clients: tuple[int, ...],
    rate: float | None,
    requests: int | None,
    prompt_tokens: int,
    output_tokens: int,
    token_ids: tuple[int, int],
    temperature: float,
    seed: int,
) -> None:
    counts = {"--requests": requests, "--prompt-tokens": prompt_tokens, "--output-tokens": output_tokens}
    for flag, value in {**counts, "--concurrency": min(clients, default=1)}.items():
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}")
    if rate is None and requests is not None and requests < max(clients):
        raise UserError(f"--requests {requests} leaves some of the {max(clients)} clients without any")
    if rate is not None and not (0 < rate < math.inf):
        raise UserError(f"--rate must be positive, not {rate}")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature must be at least 0, not {temperature}")
    if seed < 0:
        raise UserError(f"--seed must be at least 0, not {seed}")
    if not 0 <= token_ids[0] < token_ids[1]:
        raise UserError(f"--token-ids must be a range of ids, not {token_ids[0]} {token_ids[1]}")
