"""Our side, a process of its own: ``python -m scripts.equivalence.ours FOLDER``, after PyTorch's."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import idlm_jax
from idlm_jax.backbone.qwen3 import Qwen3, causal_logits
from idlm_jax.decoding.generate import SamplingParams, emissions
from idlm_jax.decoding.sampling import COUPLINGS
from idlm_jax.decoding.step import DecodeState, Policy
from idlm_jax.decoding.window import LAYOUTS
from idlm_jax.evaluation.equivalence import draw, drawn_texts, layer_outputs, prefill_copies, window_logits
from idlm_jax.evaluation.two_samples import ENDED
from scripts.equivalence.plan import DTYPES, Clock, Plan
from tests.decoding.support import OfficialCoupling

# Sequences scored at once.
BATCH = 64
SEEDS = 2**20
# Long texts cost much; these have each layout and each coupling once. (``gumbel`` also writes AR's text, seed by seed.)
LONG_TEXTS = ("standard, ratio", "branch, gumbel", "official rule")


def ways(stride: int) -> dict[str, Policy]:
    """Every way to decode that is compared, by name; the last one is known to be wrong."""
    exact = {
        f"{layout}, {coupling}": Policy(stride, LAYOUTS[layout], COUPLINGS[coupling])
        for layout in LAYOUTS
        for coupling in COUPLINGS
    }
    one = Policy(1, LAYOUTS["standard"], COUPLINGS["gumbel"])
    return {"AR": one, **exact, "official rule": Policy(stride, LAYOUTS["standard"], OfficialCoupling())}


def main(folder: Path) -> None:
    """Write our draws and texts, and how far our logits are from PyTorch's."""
    plan, clock = Plan.load(folder), Clock("idlm_jax", {})
    results: dict[str, Any] = {"logits": {}}
    if "logits" in plan.parts:
        for name, shape in (plan.shapes or {}).items():
            with clock.part(f"logits, {name}"):
                results["logits"][name] = compare_shape(folder, name, shape, plan)
    for dtype in DTYPES[:1] if plan.parts == ("draws",) else DTYPES:
        with clock.part(f"the real model, {dtype}"):
            model = idlm_jax.load(plan.gguf, adapter=plan.adapter, dtype=dtype).model
            if "logits" in plan.parts:
                results["logits"].setdefault("real", {})[dtype] = compare_logits(model, folder, "real", dtype, plan)
            if "greedy" in plan.parts:
                write_greedy(model, plan, folder, dtype)
        if dtype == "float32":
            write_sampled(model, plan, folder, clock)
        elif "texts" in plan.parts:
            with clock.part("surprisal"):
                write_surprisal(model, plan, folder)
    results["seconds"] = clock.seconds
    results["versions"] = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    (folder / "ours.json").write_text(json.dumps(results))


@dataclass(frozen=True)
class Requests:
    """Prefixes and how to sample them, decoded in one way; all draws of a way run the same compiled program."""

    model: Qwen3
    plan: Plan
    prefixes: list[list[int]]
    policy: Policy
    ignore_eos: bool = False
    greedy: bool = False

    def prefill(self) -> DecodeState:
        """The state before the first round."""
        settings = self.plan.settings(len(self.prefixes))
        room = max(self.plan.text_tokens, self.plan.greedy_tokens)
        sampling = [SamplingParams(**each, max_tokens=room, ignore_eos=self.ignore_eos) for each in settings]
        if self.greedy:
            sampling = [replace(each, temperature=0.0) for each in sampling]
        return prefill_copies(self.model, self.prefixes, sampling, self.policy, self.plan.copies)

    def draws(self, count: int, tokens: int) -> Iterator[DecodeState]:
        """At least ``count`` texts of every prefix, ``copies`` at a time, seeds counted up from SEEDS."""
        prefilled = self.prefill()
        for batch in range(-(-count // self.plan.copies)):
            yield draw(self.model, prefilled, SEEDS + batch * len(prefilled.done), self.policy, tokens)

    def texts(self, state: DecodeState, tokens: int) -> np.ndarray:
        """[prefixes, copies, tokens] of a state."""
        count = len(self.prefixes) * self.plan.copies
        return drawn_texts(state, tokens)[:count].reshape(len(self.prefixes), self.plan.copies, tokens)


def write_sampled(model: Qwen3, plan: Plan, folder: Path, clock: Clock) -> None:
    """Draws of every way, and long texts of some."""
    prefixes = json.loads((folder / "prefixes.json").read_text())
    draws, texts = {}, {}
    for name, policy in ways(plan.stride).items():
        requests = Requests(model, plan, prefixes, policy)
        if "draws" in plan.parts:
            with clock.part(f"draws, {name}"):
                states = replace(requests, ignore_eos=True).draws(plan.draws, plan.drawn_tokens)
                parts = [(requests.texts(s, plan.drawn_tokens), first_verified(s, requests)) for s in states]
                draws[name] = np.concatenate([part for part, _ in parts], axis=1)[:, : plan.draws]
                draws[f"{name}/accepted"] = np.concatenate([part for _, part in parts], axis=1)[:, : plan.draws]
        if "texts" in plan.parts and name in LONG_TEXTS:
            with clock.part(f"texts, {name}"):
                states = requests.draws(plan.texts, plan.text_tokens)
                parts = [requests.texts(state, plan.text_tokens) for state in states]
                texts[name] = np.concatenate(parts, axis=1)[:, : plan.texts]
    if draws:
        np.savez(folder / "draws-ours.npz", **draws)
    if texts:
        theirs = np.load(folder / "texts-theirs.npz")
        texts |= {f"PyTorch/{name}": until_end(theirs[name], plan.end_token) for name in theirs}
        np.savez(folder / "texts-ours.npz", **texts)


def first_verified(state: DecodeState, requests: Requests) -> np.ndarray:
    """Drafts accepted in the second round, the first that has any: the same drafts in every layout."""
    count = len(requests.prefixes) * requests.plan.copies
    return np.asarray(state.history[:count, 1]).reshape(len(requests.prefixes), -1)


def until_end(texts: np.ndarray, end_token: int) -> np.ndarray:
    """Texts that were not ended while they were drawn: ENDED after the first end token."""
    after = np.cumsum(texts == end_token, axis=-1) - (texts == end_token) > 0
    return np.where(after, ENDED, texts)


@jax.jit
def _log_probabilities(model: Qwen3, tokens: jax.Array) -> jax.Array:
    """log p [B, L − 1] of every token after the first."""
    log_p = jax.nn.log_softmax(causal_logits(model, tokens)[:, :-1], axis=-1)
    return jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[:, :, 0]


def write_surprisal(model: Qwen3, plan: Plan, folder: Path) -> None:
    """What the base model thinks of all long texts, PyTorch's included; any measure of a text will do: bfloat16."""
    prefixes = json.loads((folder / "prefixes.json").read_text())
    texts = np.load(folder / "texts-ours.npz")
    np.savez(folder / "surprisal.npz", **{name: surprisal(model, prefixes, texts[name]) for name in texts})


def surprisal(model: Qwen3, prefixes: list[list[int]], texts: np.ndarray) -> np.ndarray:
    """[prefixes, texts] mean −log p a token under the unfiltered base model."""
    count, length = texts.shape[1:]
    longest = max(map(len, prefixes)) + length
    rows = np.zeros((len(prefixes) * count, longest), np.int32)
    scored = np.zeros((len(rows), longest - 1), bool)
    for i, (row, text) in enumerate(zip(rows, texts.reshape(-1, length), strict=True)):
        prefix, text = prefixes[i // count], text[text != ENDED]
        end = len(prefix) + len(text)
        row[:end] = [*prefix, *text]
        scored[i, len(prefix) - 1 : end - 1] = True
    padded = np.concatenate([rows, np.zeros((-len(rows) % BATCH, longest), np.int32)])
    batches = [np.asarray(_log_probabilities(model, part)) for part in padded.reshape(-1, BATCH, longest)]
    log_p = np.concatenate(batches)[: len(rows)]
    return -(np.sum(log_p * scored, axis=1) / np.sum(scored, axis=1)).reshape(texts.shape[:2])


def write_greedy(model: Qwen3, plan: Plan, folder: Path, dtype: str) -> None:
    """Greedy texts, with the forward passes they took."""
    arrays: dict[str, np.ndarray] = {}
    for name, policy in ways(plan.stride).items():
        if policy.coupling.name != "gumbel":
            continue  # without noise the couplings are one
        requests = Requests(model, replace(plan, copies=1), plan.prompts, policy, ignore_eos=True, greedy=True)
        state = draw(model, requests.prefill(), 0, policy, plan.greedy_tokens)
        arrays[name.removesuffix(", gumbel")] = drawn_texts(state, plan.greedy_tokens)[: len(plan.prompts)]
        rounds = [len(each.history) for each in emissions(state, len(plan.prompts))]
        arrays[f"{name.removesuffix(', gumbel')}/rounds"] = np.array(rounds)
    np.savez(folder / f"greedy-ours-{dtype}.npz", **arrays)


def compare_shape(folder: Path, name: str, shape: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """``compare_logits`` of a random checkpoint that PyTorch's side wrote."""
    from idlm_jax.backbone.weights import fuse_projections
    from idlm_jax.checkpoint.open import load_params, open_source

    results = {}
    for dtype in DTYPES:
        source = open_source(folder / name)
        config = source.config.replace(mask_token_id=shape["vocab_size"] - 1)
        model = Qwen3(config, fuse_projections(load_params(source, jnp.dtype(dtype))))
        results[dtype] = compare_logits(model, folder, name, dtype, plan)
        del model
    return results


def compare_logits(model: Qwen3, folder: Path, name: str, dtype: str, plan: Plan) -> dict[str, Any]:
    """Our logits and layers against PyTorch's of this dtype and of float32, in units of the logits' spread."""
    theirs = {each: folder / f"{name}-{each}" for each in dict.fromkeys((dtype, "float32"))}
    tokens = np.load(theirs[dtype] / "tokens.npy")
    policy = Policy(plan.stride, LAYOUTS["branch"], COUPLINGS["gumbel"])
    outputs = layer_outputs(model, jnp.asarray(tokens))
    windows, masks = window_logits(model, tokens, policy)
    ours = {
        "clean pass": np.asarray(model.logits(model.norm(outputs[-1]))),
        "decoding window, clean rows": windows,
        "decoding window, mask rows": masks,
    }
    result: dict[str, Any] = {"rows": {}}
    for kind, logits in ours.items():
        file = "masks.npy" if "mask" in kind else "clean.npy"
        reference = {each: np.load(path / file) for each, path in theirs.items()}
        result["rows"][kind] = {each: _errors(logits, values) for each, values in reference.items()}
        if dtype != "float32":
            result["rows"][kind]["PyTorch itself"] = _errors(reference[dtype], reference["float32"])
    layers = np.asarray(outputs.astype(jnp.float32))
    result["layers"] = {each: _layer_errors(layers, np.load(path / "layers.npy")) for each, path in theirs.items()}
    if dtype != "float32":
        own, exact = (np.load(theirs[each] / "layers.npy") for each in (dtype, "float32"))
        result["layers"]["PyTorch itself"] = _layer_errors(own, exact)
    return result


def _errors(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    error, spread = np.abs(ours - theirs), float(theirs.std())
    agree = ours.argmax(-1) == theirs.argmax(-1)
    best = np.partition(theirs, -2, axis=-1)[..., -2:]
    gaps = (best[..., 1] - best[..., 0])[~agree]
    return {
        "largest": float(error.max()) / spread,
        "mean": float(error.mean()) / spread,
        "spread": spread,
        "argmax_agreement": float(agree.mean()),
        "positions": int(agree.size),
        # PyTorch's gap between its two best logits, where the best one differs.
        "largest_gap_of_a_difference": float(gaps.max(initial=0)) / spread,
        "by_position": (error.mean(axis=(0, 2)) / spread).tolist(),
    }


def _layer_errors(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Relative to the size of a layer's output."""
    axes = (1, 2, 3)
    return (np.sqrt(np.mean((ours - theirs) ** 2, axis=axes) / np.mean(theirs**2, axis=axes))).tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
