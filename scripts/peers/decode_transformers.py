"""Time transformers' autoregressive decode step, the peer of scripts/bench_decode_step.py.

Run by hand on a GPU, in the same session as that script (a tiny shape runs on a CPU, to see that it works):

    python scripts/peers/decode_transformers.py                     # Qwen3-8B, batch 1, 32 and 64, context 1024
    python scripts/peers/decode_transformers.py --batch 32          # one batch alone, if compiling all takes too long
    python scripts/peers/decode_transformers.py --model tiny --context 16 --steps 4 --dtype float32

It needs torch and transformers 5. Weights are random; a step is one forward pass of one token a request over a static
cache that holds ``context`` tokens, language-model head and argmax included. The whole model is compiled with
``reduce-overhead``, so that a step is one CUDA graph; where that fails, the reason is printed and the row says
``eager``. Steps are queued one behind another, each fed the argmax of the one before.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import default_device, first_line, print_table, print_versions, qwen3_config, synchronize
from transformers import Qwen3ForCausalLM, StaticCache

WARM_UP = 4


def random_model(options: argparse.Namespace, device: str) -> Qwen3ForCausalLM:
    """The model, made on the device."""
    config = qwen3_config(options.model)
    config._attn_implementation = options.attention
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, options.dtype))
    with torch.device(device):
        model = Qwen3ForCausalLM(config).eval()
    torch.set_default_dtype(default)
    return model


def measure(model: Qwen3ForCausalLM, batch: int, compiled: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Fill the cache, compile, and time; milliseconds a step."""
    device = model.device.type
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    slots = -(-(options.context + WARM_UP + options.steps) // 64) * 64
    cache = StaticCache(config=model.config, max_cache_len=slots)
    prompt = torch.randint(0, model.config.vocab_size, (batch, options.context), device=device)
    tokens = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, past_key_values=cache, use_cache=True).logits.argmax(-1)

    mode = "reduce-overhead" if device == "cuda" else "default"
    run: Callable[..., torch.Tensor] = torch.compile(step, dynamic=False, mode=mode) if compiled else step
    began = time.perf_counter()
    times = []
    for repeat in range(options.repeats + 1):
        for layer in cache.layers:  # back to the end of the prompt
            layer.cumulative_length.fill_(options.context)
        for number in range(WARM_UP + options.steps):
            if number == WARM_UP:
                synchronize(device)
                timed = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()
            tokens = run(tokens).clone()  # a graph's output is overwritten by its next run
            if repeat == 0 and number == 0:
                synchronize(device)
                print(f"batch {batch}: first step {time.perf_counter() - began:.1f} s", flush=True)
        synchronize(device)
        times.append((time.perf_counter() - timed) / options.steps)
    step_ms = 1e3 * statistics.median(times[1:])
    return {
        "batch": batch,
        "context": options.context,
        "run": mode if compiled else "eager",
        "step ms": round(step_ms, 2),
        "tokens/s": round(1e3 * batch / step_ms),
        "graph breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        "peak GB": round(torch.cuda.max_memory_allocated() / 1e9, 1) if device == "cuda" else None,
    }


def measure_what_runs(model: Qwen3ForCausalLM, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: compiled, or else eager, or else why neither ran."""
    for compiled in (True, False):
        try:
            return measure(model, batch, compiled, options)
        except Exception as error:  # the compiler has many kinds
            reason = first_line(error)
            print(f"batch {batch}, compiled: {compiled}: {reason}", flush=True)
        torch.cuda.empty_cache()
    return {"batch": batch, "context": options.context, "error": reason}


def main() -> None:
    """Time the batches asked for and print a table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-8b", help="a shape of configs/models, or tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 64])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = default_device()
    print_versions(device)
    rows = []
    with torch.no_grad():
        model = random_model(options, device)
        print("weights made", flush=True)
        for batch in options.batch:
            row = measure_what_runs(model, batch, options)
            rows.append(row)
            print(json.dumps(row), flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()
